"""Compiled programs of which a process keeps a bounded number: `jax.jit` never forgets one, and each holds memory.

A service that meets prompts and options of many kinds compiles one program after the other. On CPU each of a small
model holds about 15 MB and 200 memory maps, of which Linux gives a process 65,530 by default; when they run out, the
process dies. Here the programs that have not been used for longest are forgotten, and compiled again when they are
needed. What tracing and compiling leave behind lies in cycles of Python objects and in pieces between memory that is
still in use, so both are given back with them.
"""

import contextlib
import ctypes
import functools
import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import jax

MAX_PROGRAMS = 64
_MAPS, _MAX_MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")

_programs: OrderedDict[Hashable, Any] = OrderedDict()  # the one used last at the end
_lock = threading.Lock()


class BoundedJit:
    """`jax.jit(function, static_argnums, donate_argnums)`, one program for each signature of its arguments.

    A signature is the static arguments, and structure, shapes and types of the others. All instances share the bound.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        static_argnums: tuple[int, ...] = (),
        donate_argnums: tuple[int, ...] = (),
        name: str = "",
    ) -> None:
        functools.update_wrapper(self, function)
        self.__name__ = name or function.__name__
        self._function, self._static, self._donated = function, static_argnums, donate_argnums

    def __call__(self, *arguments: Any) -> Any:
        key = (self, *(self._key(index, argument) for index, argument in enumerate(arguments)))
        with _lock:
            program = _programs.pop(key, None)
            if program is None:
                program = self._jit()
                _forget_oldest()
            _programs[key] = program
        return program(*arguments)

    def _key(self, index: int, argument: Any) -> Hashable:
        if index in self._static:
            return argument
        leaves, structure = jax.tree.flatten(argument)
        return structure, tuple((getattr(x, "shape", ()), getattr(x, "dtype", type(x))) for x in leaves)

    def lower(self, *arguments: Any) -> Any:
        """The program for these arguments before XLA compiles it, as `jax.jit` gives it."""
        return self._jit().lower(*arguments)

    def _jit(self) -> Any:
        # A function of its own: what JAX keeps of a function goes with the function.
        @functools.wraps(self._function)
        def function(*arguments: Any) -> Any:
            return self._function(*arguments)

        function.__name__ = self.__name__
        return jax.jit(function, static_argnums=self._static, donate_argnums=self._donated)


def bounded_jit(
    static_argnums: tuple[int, ...] = (), donate_argnums: tuple[int, ...] = (), name: str = ""
) -> Callable[[Callable[..., Any]], BoundedJit]:
    """`BoundedJit` as a decorator. name: what logs and profiles call it; by default the function's own name."""
    return lambda function: BoundedJit(function, static_argnums, donate_argnums, name)


def num_programs() -> int:
    """How many programs are kept."""
    with _lock:
        return len(_programs)


def _forget_oldest() -> None:
    """Makes room for one more program: within the bound, and within half of the memory maps of the process."""
    if len(_programs) >= MAX_PROGRAMS:  # giving memory back takes half a second: several at once
        _forget(-(-MAX_PROGRAMS // 8))
    elif _programs and _maps_run_short():  # counting the maps takes as long as a small program: several at once
        _forget(-(-len(_programs) // 4))


def _forget(count: int) -> None:
    """Forgets the `count` programs used least recently, and gives the memory that they held back to the system."""
    for _ in range(count):
        _programs.popitem(last=False)
    gc.collect()
    with contextlib.suppress(
        OSError, AttributeError, TypeError
    ):  # another C library than glibc keeps or returns it by itself
        ctypes.CDLL(None).malloc_trim(0)


def _maps_run_short() -> bool:
    try:
        with _MAPS.open("rb") as lines:
            used = sum(1 for _ in lines)
        return used > int(_MAX_MAPS.read_text()) // 2
    except (OSError, ValueError):  # not Linux, or not told
        return False
