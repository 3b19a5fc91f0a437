"""Reads the pickle of a PyTorch state dictionary without running any code: tensors, their storages, nothing else.

A pickle is a program for a stack machine, and Python's own machine calls whatever function it names. This one knows the
few instructions of which `torch.save` builds a state dictionary, represents what they name as data
(`models/checkpoints/pickled_objects.py`), and refuses every other instruction and every other name. PyTorch is not
needed.

Memory stays in proportion to the pickle: an object that is used many times exists once.
"""

import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import Any

from decodax.core.printable import printable
from decodax.models.checkpoints.pickled_objects import (
    CONVERT,
    FUNCTIONS,
    Name,
    PickledTensor,
    allowed,
    short,
    storage_of,
    update,
)

_MAX_INSTRUCTIONS = 2**22  # thirty describe a tensor
_MARK = object()


def read_state(content: bytes) -> dict[str, PickledTensor]:
    """The tensors of a pickled state dictionary by name.

    Raises ValueError for any other pickle: it names what is not allowed.
    """
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if opcode.name == "STOP":
                break
            if count >= _MAX_INSTRUCTIONS:
                raise ValueError(f"its pickle has more than {_MAX_INSTRUCTIONS:,} instructions, which are not read")
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, struct.error, OverflowError) as error:
        raise ValueError(f"its pickle is damaged ({printable(error)}): download the file again") from None
    if len(machine.stack) != 1 or not isinstance(state := machine.stack[0], dict):
        raise ValueError(f"it holds no state dictionary (tensors by name) but something else: {CONVERT}")
    for name, value in state.items():
        if not isinstance(value, PickledTensor):
            raise ValueError(
                f"{printable(repr(name))} in it is no tensor: it holds something other than a state dictionary "
                f"(tensors by name); {CONVERT}"
            )
    return state


class _Machine:
    """The stack machine."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """One instruction."""
        if name in _PUSHES:
            self.stack.append(_PUSHES[name](argument))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            if len(self.stack) < count:
                raise IndexError(f"{name} of {len(self.stack)} objects")
            self.stack[-count:] = [tuple(self.stack[-count:])]
        elif name in _METHODS:
            getattr(self, _METHODS[name])()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"its pickle has the instruction {name}, which no state dictionary needs: {CONVERT}")

    def _to_mark(self) -> list[Any]:
        """The objects above the last mark, which are removed with it."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                found = self.stack[index + 1 :]
                del self.stack[index:]
                return found
        raise IndexError("no mark")

    def _tuple(self) -> None:
        self.stack.append(tuple(self._to_mark()))

    def _list(self) -> None:
        self.stack.append(self._to_mark())

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self._to_mark())

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("its pickle is damaged (an item of no list): download the file again")
        self.stack[-1].extend(items)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        update(self.stack[-1], [key, value])

    def _set_items(self) -> None:
        items = self._to_mark()
        update(self.stack[-1], items)

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(allowed(f"{module} {name}" if isinstance(module, str) and isinstance(name, str) else "?"))

    def _persistent(self) -> None:
        self.stack.append(storage_of(self.stack.pop()))

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple) or function.text not in FUNCTIONS:
            raise ValueError("its pickle calls something that is no function of a state dictionary, which is not done")
        self.stack.append(FUNCTIONS[function.text](arguments))

    def _build(self) -> None:
        """An attribute of a dictionary: `_metadata`, versions of modules, which nothing reads."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise ValueError("its pickle sets attributes of something that is no dictionary, which is not done")


_PUSHES: Mapping[str, Callable[[Any], Any]] = {
    "MARK": lambda _: _MARK,
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "GLOBAL": allowed,
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINFLOAT"), lambda value: value),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), short),
}
_METHODS = {
    "TUPLE": "_tuple",
    "LIST": "_list",
    "APPEND": "_append",
    "APPENDS": "_appends",
    "SETITEM": "_set_item",
    "SETITEMS": "_set_items",
    "STACK_GLOBAL": "_stack_global",
    "BINPERSID": "_persistent",
    "REDUCE": "_reduce",
    "BUILD": "_build",
}
