"""Selects which implementation of a kernel runs, and gives the reason.

A kernel has up to three: `xla` (its reference, on any device), `tpu` (Pallas, Mosaic TPU) and `gpu` (Pallas, Mosaic
GPU: Hopper). The default is the one for this process's device, or for that of `compiled_for`, if it supports these
shapes and dtypes, and `xla` otherwise; `implementation=` asks for one. `tpu_interpreted` and `gpu_interpreted` run the
kernel on CPU, slowly, with uninitialised memory as NaN: they are for tests.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, wraps
from importlib import import_module
from typing import Any, Literal, get_args

import jax

Implementation = Literal["xla", "tpu", "gpu", "tpu_interpreted", "gpu_interpreted"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
UnsupportedReason = Callable[[str], str | None]


@dataclass(frozen=True)
class KernelSelection:
    """The implementation that runs, and the reason as text for a user."""

    implementation: Implementation
    reason: str

    @property
    def interpret(self) -> bool:
        return self.implementation.endswith("_interpreted")

    @property
    def backend(self) -> Literal["xla", "tpu", "gpu"]:
        """The file that runs: reference.py, kernel_tpu.py or kernel_gpu.py."""
        return self.implementation.removesuffix("_interpreted")  # type: ignore[return-value]


def every_reason(reasons: Callable[..., Iterator[str | None]]) -> Callable[..., str | None]:
    """A generator of reasons as a function that gives all of them as one text, None where there are none.

    >>> every_reason(lambda size: (f"{size} is {word}" for word in ("odd", None, "large")))(1001)
    '1001 is odd; 1001 is large'
    """

    @wraps(reasons)
    def every(*operands: Any, **options: Any) -> str | None:
        return "; ".join(filter(None, reasons(*operands, **options))) or None

    return every


def select_kernel(kernel: str, asked: Implementation | None, unsupported_reason: UnsupportedReason) -> KernelSelection:
    """The implementation to run.

    kernel: its name, for messages.
    asked: the implementation asked for; None: the default.
    unsupported_reason: ("tpu" or "gpu") -> why that one does not support the operands; None if it does.
    Raises ValueError for a name that does not exist.
    Raises NotImplementedError if the one asked for does not support the operands.
    """
    if asked is None:
        backend, reason = backend_of_device()
        if backend == "xla":
            return KernelSelection("xla", reason)
        reason_against = unsupported_reason(backend)
        return (
            KernelSelection(backend, reason)
            if reason_against is None
            else KernelSelection("xla", f"{reason}, but {reason_against}")
        )
    if asked not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {asked!r}")
    selection = KernelSelection(asked, "asked for")
    reason_against = None if selection.backend == "xla" else unsupported_reason(selection.backend)
    if reason_against is not None:
        raise NotImplementedError(f"{kernel} with implementation={asked!r}: {reason_against}: use implementation='xla'")
    return selection


_TARGET: ContextVar[str | None] = ContextVar("decodax_target_device", default=None)


@contextmanager
def compiled_for(platform: Literal["tpu", "cpu"]) -> Iterator[None]:
    """What is traced within takes the kernels of such a device, which need not be here; for compiling ahead of time.

    A function that `jax.jit` has traced before for the same arguments keeps what it had: give it a new one.
    """
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)


def platform_of_device() -> str:
    """The platform for which programs are traced: that of `compiled_for`, or of this process."""
    return _TARGET.get() or jax.default_backend()


def backend_of_device() -> tuple[Literal["xla", "tpu", "gpu"], str]:
    """The kernels of the device for which programs are traced, and the reason."""
    target = _TARGET.get()
    if target is None:
        return backend_of_this_device()
    return ("tpu", "the program is for a TPU") if target == "tpu" else ("xla", f"there are no kernels for {target}")


@cache
def backend_of_this_device() -> tuple[Literal["xla", "tpu", "gpu"], str]:
    platform = jax.default_backend()
    if platform == "tpu":
        return "tpu", "the device is a TPU"
    if platform == "gpu":
        capability = str(getattr(jax.devices()[0], "compute_capability", "unknown"))
        if capability.startswith("9."):
            return "gpu", "the device is a Hopper GPU"
        return "xla", f"kernels need a Hopper GPU (compute capability 9.x), this one has {capability}"
    return "xla", f"there are no kernels for {platform}"


def select_in_folder(
    folder: str, asked: Implementation | None, *operands: Any, name: str | None = None, **options: Any
) -> KernelSelection:
    """`select_kernel` for a kernel's folder, by the `unsupported_reason` of its kernel_tpu.py and kernel_gpu.py.

    These are imported only if needed. The GPU's also gets `interpret`, as an interpreter supports float32.

    folder: of the kernel.
    asked: the implementation asked for; None: the default.
    operands, options: of `unsupported_reason`.
    name: of the kernel, if it is not the folder's.
    """

    def unsupported_reason(backend: str) -> str | None:
        kernel = import_module(f"decodax.kernels_pallas.{folder}.kernel_{backend}")
        if backend == "tpu":
            return kernel.unsupported_reason(*operands, **options)
        return kernel.unsupported_reason(*operands, **options, interpret=asked == "gpu_interpreted")

    return select_kernel(name or folder, asked, unsupported_reason)
