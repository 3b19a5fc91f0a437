"""Lists the Pallas kernels for TPU and GPU, one folder each; the library also runs without them, on XLA.

Importing this imports none of them, and no Pallas.
"""

if __name__ != "decodax.kernels_pallas":
    raise ImportError("kernels_pallas is a part of decodax: import decodax.kernels_pallas")

import importlib
import inspect
from types import ModuleType
from typing import Any

# A kernel's function -> its folder, which also has its kernel selection (`select_<folder>`), its reference and, in
# `shapes.py`, its real sizes.
KERNELS = {
    "flash_prefill": "decodax.kernels_pallas.flash_prefill",
    "flash_decode": "decodax.kernels_pallas.flash_decode",
    "paged_decode": "decodax.kernels_pallas.paged_decode",
    "block_sparse_prefill": "decodax.kernels_pallas.block_sparse_prefill",
    "gather_decode": "decodax.kernels_pallas.gather_decode",
    "mla_decode": "decodax.kernels_pallas.mla_decode",
    "grouped_matmul": "decodax.kernels_pallas.grouped_matmul",
    "grouped_gate_up": "decodax.kernels_pallas.grouped_matmul",
    "linear_attention": "decodax.kernels_pallas.linear_attention",
}


def module_of(kernel: str) -> ModuleType:
    """The folder of a kernel, imported now.

    Raises ValueError for a kernel that does not exist.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    return importlib.import_module(KERNELS[kernel])


def shapes_of(kernel: str) -> dict[str, Any]:
    """The kernel's real sizes, by the names of the models that have them.

    Each gives `operands()`, shapes of the array arguments of the kernel's function, and `options()`, its other
    arguments; `random_operands(seed)`, arrays of those shapes; `bytes_moved()` and `flops()`, the least that the call
    needs.
    """
    module = module_of(kernel)
    takes = set(inspect.signature(getattr(module, kernel)).parameters)
    shapes = importlib.import_module(f"{module.__name__}.shapes").SHAPES
    return {name: shape for name, shape in shapes.items() if takes >= set(shape.operands())}
