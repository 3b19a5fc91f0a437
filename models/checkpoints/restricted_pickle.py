"""Reads the pickle of a PyTorch state dictionary without running any code: tensors, their storages, nothing else.

A pickle is a program for a stack machine, and Python's own machine calls whatever function it names. This one knows the
few instructions of which `torch.save` builds a state dictionary, represents the five functions named there as data, and
refuses every other instruction and every other name. PyTorch is not needed.

Memory stays in proportion to the pickle: numbers are short, and an object that is used many times exists once.
"""

import math
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from decodax.core.printable import printable

_STORAGES = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
    "torch.UntypedStorage": "U8",
    "torch.storage.UntypedStorage": "U8",
}
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_DICTIONARY = "collections.OrderedDict"
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_NAMES = frozenset({_DICTIONARY, _TENSOR, _PARAMETER, *_STORAGES})
_MAX_AXES, _MAX_NUMBERS = 32, 2**62
_MAX_LONG_BYTES = 9  # of a whole number: 64 bits and its sign
CONVERT = (
    "convert it once with transformers, AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder), which "
    "writes safetensors"
)


@dataclass(frozen=True)
class Storage:
    """A storage: the kind of its numbers, its key in the file, and how many there are."""

    kind: str
    key: str
    count: int


@dataclass(frozen=True)
class PickledTensor:
    """A tensor: number [i, j, ..] is storage[offset + i * strides[0] + j * strides[1] + ..]."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    """A name that the pickle may use."""

    text: str


_MARK = object()


def read_state(content: bytes) -> dict[str, PickledTensor]:
    """The tensors of a pickled state dictionary by name.

    Raises ValueError for any other pickle: it names what is not allowed.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                break
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
        _update(self.stack[-1], [key, value])

    def _set_items(self) -> None:
        items = self._to_mark()
        _update(self.stack[-1], items)

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_allowed(f"{module} {name}" if isinstance(module, str) and isinstance(name, str) else "?"))

    def _persistent(self) -> None:
        self.stack.append(_storage(self.stack.pop()))

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple) or function.text not in _FUNCTIONS:
            raise ValueError("its pickle calls something that is no function of a state dictionary, which is not done")
        self.stack.append(_FUNCTIONS[function.text](arguments))

    def _build(self) -> None:
        """An attribute of a dictionary: `_metadata`, versions of modules, which nothing reads."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise ValueError("its pickle sets attributes of something that is no dictionary, which is not done")


def _update(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2 or not all(type(key) is str for key in items[::2]):
        raise ValueError(
            f"its pickle has an object with keys that are no texts, which no state dictionary has: {CONVERT}"
        )
    target.update(zip(items[::2], items[1::2], strict=True))


def _allowed(argument: str) -> _Name:
    """The name of a GLOBAL instruction: module and name with a space between them."""
    text = ".".join(argument.split(" ", 1))
    if text not in _NAMES:
        raise ValueError(
            f"its pickle names {printable(text)}, which could run code and is not used: only tensors and their "
            f"storages are read; if you trust the file, {CONVERT}"
        )
    return _Name(text)


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_NUMBERS


def _are_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= _MAX_AXES and all(map(_whole, value))


def _short(value: int) -> int:
    if value.bit_length() > 8 * _MAX_LONG_BYTES:
        raise ValueError("its pickle has a number of more than 64 bits, which no size has: download the file again")
    return value


def _storage(described: Any) -> Storage:
    """("storage", class, key, device, count) as a storage."""
    if isinstance(described, tuple) and len(described) in (5, 6) and described[0] == "storage":
        kind, key, count = described[1], described[2], described[4]
        if isinstance(kind, _Name) and kind.text in _STORAGES and type(key) is str and _whole(count):
            return Storage(_STORAGES[kind.text], key, count)
    raise ValueError("its pickle describes a storage in an unknown way: download the file again")


def _tensor(arguments: tuple[Any, ...]) -> PickledTensor:
    """(storage, offset, sizes, strides, ...) as a tensor within its storage."""
    storage, offset, sizes, strides = arguments[:4] if len(arguments) >= 4 else (None,) * 4
    if not (
        isinstance(storage, Storage)
        and _whole(offset)
        and all(
            isinstance(item, tuple) and len(item) <= _MAX_AXES and all(map(_whole, item)) for item in (sizes, strides)
        )
        and len(sizes) == len(strides)
    ):
        raise ValueError("its pickle describes a tensor in an unknown way: download the file again")
    count = math.prod(sizes)
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if math.prod(size or 1 for size in sizes) > _MAX_NUMBERS or (count and last >= storage.count):
        raise ValueError(
            f"its pickle has a tensor {printable(list(sizes))} that ends after the {storage.count:,} numbers of its "
            f"storage {printable(storage.key)}: download the file again"
        )
    return PickledTensor(storage, offset, sizes, strides)


def _parameter(arguments: tuple[Any, ...]) -> PickledTensor:
    if not arguments or not isinstance(arguments[0], PickledTensor):
        raise ValueError("its pickle describes a parameter in an unknown way: download the file again")
    return arguments[0]


def _dictionary(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """An empty dictionary, or that of a list of pairs."""
    found: dict[str, Any] = {}
    pairs = arguments[0] if len(arguments) == 1 else []
    if len(arguments) > 1 or not isinstance(pairs, list):
        raise ValueError("its pickle describes a dictionary in an unknown way: download the file again")
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError("its pickle describes a dictionary in an unknown way: download the file again")
        _update(found, list(pair))
    return found


_FUNCTIONS: Mapping[str, Callable[[tuple[Any, ...]], Any]] = {
    _DICTIONARY: _dictionary,
    _TENSOR: _tensor,
    _PARAMETER: _parameter,
}
_PUSHES: Mapping[str, Callable[[Any], Any]] = {
    "MARK": lambda _: _MARK,
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "GLOBAL": _allowed,
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINFLOAT"), lambda value: value),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), _short),
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
