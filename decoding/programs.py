"""Bounds the number of compiled programs that a process keeps: `jax.jit` never drops one, and each holds memory.

A service that gets prompts and options of many kinds compiles one program after the other. On CPU each program of a
small model holds about 15 MB and 200 memory maps, of which Linux gives a process 65,530 by default; when they run out,
the process dies. Here the least recently used programs are dropped, and compiled again when they are needed. Tracing
and compiling leave cycles of Python objects and small pieces of free memory between used ones: both are given back.
"""

import contextlib
import ctypes
import functools
import gc
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import jax

from decodax.decoding.compile_clock import add_compile_seconds

MAX_PROGRAMS = 64
_MAPS, _MAX_MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")

_programs: OrderedDict[Hashable, Any] = OrderedDict()  # most recently used last
_preparing: dict[Hashable, threading.Event] = {}  # programs that another thread compiles
_lock = threading.Lock()


class BoundedJit:
    """`jax.jit(function, static_argnums, donate_argnums)`, one program for each signature of its arguments.

    A signature is the static arguments, and structure, shapes and dtypes of the others. All instances share the bound.
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
        key = self._full_key(arguments)
        with _lock:
            ready = _preparing.get(key)
        if ready is not None:
            begin = time.perf_counter()
            ready.wait()
            add_compile_seconds(time.perf_counter() - begin)
        return self._program(key)(*arguments)

    def prepare(self, *arguments: Any) -> Any:
        """Compiles the program for these arguments, which may be shapes; a call with such arguments then finds it.

        For another thread than the one that calls, so that several programs compile side by side. Gives the shapes of
        the results; None where the program is there already.
        """
        key, ready = self._full_key(arguments), threading.Event()
        with _lock:
            if key in _programs:
                return None
            _preparing[key] = ready  # before the program is there, so that every call that finds it waits
        try:
            lowered = self._program(key).lower(*arguments)
            lowered.compile()
            return jax.tree.map(lambda out: jax.ShapeDtypeStruct(out.shape, out.dtype), lowered.out_info)
        finally:
            with _lock:
                del _preparing[key]
            ready.set()

    def _program(self, key: Hashable) -> Any:
        """The program of this key, which may be new."""
        with _lock:
            program = _programs.pop(key, None)
            if program is None:
                program = self._jit()
                _drop_oldest()
            _programs[key] = program
        return program

    def _full_key(self, arguments: tuple[Any, ...]) -> Hashable:
        return (self, *(self._key(index, argument) for index, argument in enumerate(arguments)))

    def _key(self, index: int, argument: Any) -> Hashable:
        if index in self._static:
            return argument
        leaves, structure = jax.tree.flatten(argument)
        return structure, tuple((getattr(x, "shape", ()), getattr(x, "dtype", type(x))) for x in leaves)

    def lower(self, *arguments: Any) -> Any:
        """The program for these arguments before XLA compiles it, as `jax.jit` gives it."""
        return self._jit().lower(*arguments)

    def _jit(self) -> Any:
        # A new function each time: what JAX caches for a function is freed with it.
        @functools.wraps(self._function)
        def function(*arguments: Any) -> Any:
            return self._function(*arguments)

        function.__name__ = self.__name__
        return jax.jit(function, static_argnums=self._static, donate_argnums=self._donated)


def bounded_jit(
    static_argnums: tuple[int, ...] = (), donate_argnums: tuple[int, ...] = (), name: str = ""
) -> Callable[[Callable[..., Any]], BoundedJit]:
    """`BoundedJit` as a decorator. name: in logs and profiles; by default the function's own."""
    return lambda function: BoundedJit(function, static_argnums, donate_argnums, name)


def num_programs() -> int:
    """The number of programs kept."""
    with _lock:
        return len(_programs)


def _drop_oldest() -> None:
    """Drops programs until one more fits: within the bound, and within half of the process's memory maps."""
    if len(_programs) >= MAX_PROGRAMS:  # giving memory back takes half a second: several at once
        _drop(-(-MAX_PROGRAMS // 8))
    elif _programs and _maps_run_short():  # counting the maps takes as long as a small program: several at once
        _drop(-(-len(_programs) // 4))


def _drop(count: int) -> None:
    """Drops the `count` least recently used programs, and gives the memory that they held back to the system."""
    for _ in range(count):
        _programs.popitem(last=False)
    gc.collect()
    # Another C library than glibc keeps the memory, or returns it by itself.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _maps_run_short() -> bool:
    try:
        with _MAPS.open("rb") as lines:
            used = sum(1 for _ in lines)
        return used > int(_MAX_MAPS.read_text()) // 2
    except (OSError, ValueError):  # not Linux, or not readable
        return False
