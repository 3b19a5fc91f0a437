"""Which implementation of a kernel runs, and why.

A kernel has up to three: `xla` (its reference, on any device), `tpu` (Pallas, Mosaic TPU) and `gpu` (Pallas, Mosaic
GPU: Hopper). By default the one for this process's device is taken if it takes these shapes and dtypes, and `xla`
otherwise; `implementation=` asks for one. `tpu_interpreted` and `gpu_interpreted` run the kernel on CPU, slowly, with
uninitialised memory as NaN: they are for tests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal, get_args

import jax

Implementation = Literal["xla", "tpu", "gpu", "tpu_interpreted", "gpu_interpreted"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
Misfit = Callable[[str], str | None]


@dataclass(frozen=True)
class Choice:
    """What runs, and why that and nothing else, in words for a user."""

    implementation: Implementation
    reason: str

    @property
    def interpret(self) -> bool:
        return self.implementation.endswith("_interpreted")

    @property
    def backend(self) -> Literal["xla", "tpu", "gpu"]:
        """The file that runs: reference.py, kernel_tpu.py or kernel_gpu.py."""
        return self.implementation.removesuffix("_interpreted")  # type: ignore[return-value]


def choose(kernel: str, asked: Implementation | None, misfit: Misfit) -> Choice:
    """The implementation to run; `misfit("tpu" or "gpu")` says why that one does not take the operands (None: it does).

    Raises ValueError for a name that does not exist, NotImplementedError if the one asked for does not take them.
    """
    if asked is None:
        backend, reason = backend_of_this_device()
        if backend == "xla":
            return Choice("xla", reason)
        why_not = misfit(backend)
        return Choice(backend, reason) if why_not is None else Choice("xla", f"{reason}, but {why_not}")
    if asked not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {asked!r}")
    choice = Choice(asked, "asked for")
    why_not = None if choice.backend == "xla" else misfit(choice.backend)
    if why_not is not None:
        raise NotImplementedError(f"{kernel} with implementation={asked!r}: {why_not}; implementation='xla' takes it")
    return choice


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


def choose_in(
    folder: str, asked: Implementation | None, *operands: Any, name: str | None = None, **options: Any
) -> Choice:
    """`choose` for a kernel's folder, by the `misfit` of its kernel_tpu.py and kernel_gpu.py.

    These are imported only if they come into question. That for GPU also hears whether it is to be interpreted, as an
    interpreter takes float32. name: of the kernel, where it is not the folder's.
    """

    def misfit(backend: str) -> str | None:
        kernel = import_module(f"decodax.kernels_pallas.{folder}.kernel_{backend}")
        if backend == "tpu":
            return kernel.misfit(*operands, **options)
        return kernel.misfit(*operands, **options, interpret=asked == "gpu_interpreted")

    return choose(name or folder, asked, misfit)
