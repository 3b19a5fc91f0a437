"""`decodax bench --kernels` shows which implementation of each kernel runs on this machine, and why. Nothing is run."""

import inspect
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from decodax.decoding.sizes import cache_capacity
from decodax.kernels_pallas import KERNELS, module_of, shapes_of
from decodax.kernels_pallas.selection import KernelSelection
from decodax.layers.execution import ON_THIS_DEVICE
from decodax.models.config import ModelConfig
from decodax.models.configs.hf_config import load_config
from decodax.models.layer_kernels import LayerKernel, layer_kernels
from decodax.models.load import find_folder, working_dtype
from decodax.models.model import Model

# The operands that decide, in the order of a kernel's `select_...` function.
_DECIDING = {
    "flash_prefill": ("query", "key", "value"),
    "flash_decode": ("query", "key", "value", "new"),
    "paged_decode": ("query", "key_pages", "value_pages", "table", "new"),
    "block_sparse_prefill": ("query", "key", "value", "blocks"),
    "gather_decode": ("query", "key", "value", "index", "new"),
    "mla_decode": ("query_latent", "query_rope", "latent", "rope_key", "new"),
    "grouped_matmul": ("tokens", "weight"),
    "grouped_gate_up": ("tokens", "gate", "up"),
    "linear_attention": ("query", "key", "value", "log_decay"),
}


@dataclass(frozen=True)
class KernelRow:
    """The kernel selection on this machine for one shape.

    implementation, reason: what runs, and why.
    tpu, gpu: why that kernel does not support the shape, None if it does.
    """

    kernel: str
    shape: str
    implementation: str
    reason: str
    tpu: str | None
    gpu: str | None


def kernel_selections() -> list[KernelRow]:
    """One for each kernel, on the first of its real sizes."""
    rows = []
    for kernel in KERNELS:
        name, shape = next(iter(shapes_of(kernel).items()))
        here = select(kernel, shape, None)
        rows.append(KernelRow(kernel, name, here.implementation, here.reason, *unsupported_reasons(kernel, shape)))
    return rows


def select(kernel: str, shape: Any, implementation: str | None) -> KernelSelection:
    """What the kernel's function runs for a shape.

    Raises NotImplementedError if the implementation asked for does not support it.
    """
    module, operands = module_of(kernel), shape.operands()
    function = getattr(module, f"select_{module.__name__.rpartition('.')[2]}")
    parameters = inspect.signature(function).parameters
    options = {name: value for name, value in shape.options().items() if name in parameters}
    deciding = [operands.get(name) for name in _DECIDING[kernel] if name in operands or name == "new"]
    return function(*deciding, **options, implementation=implementation)


def unsupported_reasons(kernel: str, shape: Any) -> list[str | None]:
    """Why the kernels for TPU and for GPU do not support a shape, None for one that does."""
    found = []
    for backend in ("tpu", "gpu"):
        try:
            select(kernel, shape, backend)
            found.append(None)
        except NotImplementedError as unsupported_reason:
            found.append(str(unsupported_reason))
    return found


def read_model(path_or_id: str | None, dtype: str | None) -> tuple[str, ModelConfig, str]:
    """A model's name, its sizes without its weights, and the dtype that it would be loaded with."""
    folder = find_folder(path_or_id)
    return folder.name, load_config(folder)[1], working_dtype(dtype).name


def layer_selections(
    config: ModelConfig, dtype: DTypeLike, batch_size: int, prompt_tokens: int, new_tokens: int
) -> list[LayerKernel]:
    """For layers of the same sizes, what runs in prefill and in decoding."""
    capacity = cache_capacity(prompt_tokens + new_tokens, ON_THIS_DEVICE)
    return list(layer_kernels(Model(config), jnp.dtype(dtype), batch_size, prompt_tokens, 1, capacity))


def document(kernels: list[KernelRow], layers: list[LayerKernel]) -> dict[str, Any]:
    """The document of `--json`."""
    return {"kernels": [asdict(row) for row in kernels], "layers": [asdict(row) for row in layers]}


def print_tables(name: str, kernels: list[KernelRow], layers: list[LayerKernel], caption: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="kernels on their first named sizes", caption=caption)
    for heading in ("kernel", "shape", "runs", "why", "supported on"):
        table.add_column(heading)
    for row in kernels:
        backends = [
            backend.upper()
            for backend, unsupported_reason in (("tpu", row.tpu), ("gpu", row.gpu))
            if unsupported_reason is None
        ]
        table.add_row(row.kernel, row.shape, row.implementation, row.reason, ", ".join(backends))
    Console().print(table)
    table = Table(title=f"layers of {name}")
    for heading in ("layers", "part", "while", "runs", "why"):
        table.add_column(heading)
    for row in layers:
        table.add_row(row.layers, row.part, row.step, row.implementation, row.reason)
    Console().print(table)
