"""Compiles for an absent TPU (libtpu does it without one); a test is skipped where libtpu is missing."""

from collections.abc import Callable
from typing import Any

import pytest
from jax.sharding import Mesh

from benchmarks import _ahead_of_time
from benchmarks._ahead_of_time import CHIPS, count_kernels

__all__ = ["CHIPS", "compile_for_tpu", "count_kernels", "tpu_mesh"]


def compile_for_tpu(chip: str, function: Callable[..., Any], *arguments: Any, **jit_options: Any) -> Any:
    """The compiled program for one chip. Arguments are trees of arrays or shapes; no array's content is needed."""
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu (Linux on x86-64)")
    return _ahead_of_time.compile_for_tpu(chip, function, *arguments, **jit_options)


def tpu_mesh(chip: str, num_chips: int) -> Mesh:
    """Chips of one host, as a mesh with the axis "tensor"."""
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu (Linux on x86-64)")
    return _ahead_of_time.tpu_mesh(chip, num_chips)
