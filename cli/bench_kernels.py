"""`decodax bench --kernels`: which implementation of each kernel runs on this machine, and why. Nothing is run."""

import inspect
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from decodax.decoding.sizes import cache_capacity
from decodax.kernels_pallas import KERNELS, module_of, shapes_of
from decodax.kernels_pallas.choice import Choice
from decodax.layers.attention.attend_kernels import choose_attention
from decodax.layers.attention.mask import Causal, Window
from decodax.layers.execution import ON_THIS_DEVICE
from decodax.layers.mixers.gqa import GQAConfig
from decodax.models.config import ModelConfig
from decodax.models.hf_config import load_config
from decodax.models.load import find_folder, working_dtype

# The operands that decide, in the order in which a kernel's `choose_...` takes them.
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
class KernelChoice:
    """What runs here for one shape. `tpu`, `gpu`: why a kernel does not take it, None if it does."""

    kernel: str
    shape: str
    implementation: str
    reason: str
    tpu: str | None
    gpu: str | None


@dataclass(frozen=True)
class LayerChoice:
    """What the attention of some of a model's layers runs here."""

    layers: str
    step: str
    implementation: str
    reason: str


def kernel_choices() -> list[KernelChoice]:
    """One for each kernel, on the first of its real sizes."""
    rows = []
    for kernel in KERNELS:
        name, shape = next(iter(shapes_of(kernel).items()))
        here = choose(kernel, shape, None)
        rows.append(KernelChoice(kernel, name, here.implementation, here.reason, *misfits(kernel, shape)))
    return rows


def choose(kernel: str, shape: Any, implementation: str | None) -> Choice:
    """What the kernel's function runs for a shape; NotImplementedError if the one asked for does not take it."""
    module, operands = module_of(kernel), shape.operands()
    function = getattr(module, f"choose_{module.__name__.rpartition('.')[2]}")
    takes = inspect.signature(function).parameters
    options = {name: value for name, value in shape.options().items() if name in takes}
    deciding = [operands.get(name) for name in _DECIDING[kernel] if name in operands or name == "new"]
    return function(*deciding, **options, implementation=implementation)


def misfits(kernel: str, shape: Any) -> list[str | None]:
    """Why the kernels for TPU and for GPU do not take a shape, None for one that does."""
    found = []
    for backend in ("tpu", "gpu"):
        try:
            choose(kernel, shape, backend)
            found.append(None)
        except NotImplementedError as misfit:
            found.append(str(misfit))
    return found


def read_model(path_or_id: str | None, dtype: str | None) -> tuple[str, ModelConfig, str]:
    """A model's name, its sizes without its weights, and the dtype that it would be loaded with."""
    folder = find_folder(path_or_id)
    return folder.name, load_config(folder)[1], working_dtype(dtype).name


def layer_choices(
    config: ModelConfig, dtype: DTypeLike, batch_size: int, prompt_tokens: int, new_tokens: int
) -> list[LayerChoice]:
    """For layers of the same sizes, what runs while a prompt is read and while tokens are decoded."""
    groups: dict[Any, list[int]] = {}
    for index, block in enumerate(config.blocks):
        groups.setdefault(block.mixer, []).append(index)
    rows = []
    for mixer, layers in groups.items():
        for step, num_tokens in (("prompt", prompt_tokens), ("decoding", 1)):
            here = _choose_for_layer(mixer, dtype, batch_size, num_tokens, prompt_tokens + new_tokens)
            named = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}..{layers[-1]} ({len(layers)})"
            rows.append(LayerChoice(named, step, here.implementation, here.reason))
    return rows


def _choose_for_layer(mixer: Any, dtype: DTypeLike, batch_size: int, num_tokens: int, num_cached: int) -> Choice:
    if not isinstance(mixer, GQAConfig):
        return Choice("xla", f"{type(mixer).__name__} has no kernel")

    def heads(count: int, *, first: bool) -> jax.ShapeDtypeStruct:
        middle = (num_tokens, count) if first else (count, num_tokens)
        return jax.ShapeDtypeStruct((batch_size, *middle, mixer.head_size), jnp.dtype(dtype))

    capacity = cache_capacity(num_cached, ON_THIS_DEVICE)
    cache = jax.eval_shape(lambda: mixer.empty_cache(batch_size, capacity, dtype))
    mask = Causal() if mixer.window is None else Causal() & Window(mixer.window)
    own = heads(mixer.num_kv_heads, first=False)
    return choose_attention(heads(mixer.num_heads, first=True), own, own, mask, cache, ON_THIS_DEVICE)


def document(kernels: list[KernelChoice], layers: list[LayerChoice]) -> dict[str, Any]:
    """For `--json`."""
    return {"kernels": [asdict(row) for row in kernels], "layers": [asdict(row) for row in layers]}


def print_tables(name: str, kernels: list[KernelChoice], layers: list[LayerChoice], caption: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="kernels on their first named sizes", caption=caption)
    for heading in ("kernel", "shape", "runs", "why", "there is one for"):
        table.add_column(heading)
    for row in kernels:
        there = [backend.upper() for backend, misfit in (("tpu", row.tpu), ("gpu", row.gpu)) if misfit is None]
        table.add_row(row.kernel, row.shape, row.implementation, row.reason, ", ".join(there))
    Console().print(table)
    table = Table(title=f"attention of {name}")
    for heading in ("layers", "while", "runs", "why"):
        table.add_column(heading)
    for row in layers:
        table.add_row(row.layers, row.step, row.implementation, row.reason)
    Console().print(table)
