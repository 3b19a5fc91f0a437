"""Says which kernels a model's layers run, and why not others: for statistics, `decodax bench --kernels` and `load`."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from decodax.kernels_pallas.selection import KernelSelection
from decodax.layers.execution import Execution
from decodax.layers.moe.layer import MoEConfig
from decodax.models.config import ModelConfig
from decodax.models.model import Model

_TYPICAL = (1, 128, 1024)  # rows, tokens of a prompt's chunk, capacity: what `check_kernels` asks for


@dataclass(frozen=True)
class LayerKernel:
    """What runs in some layers of a model, alike in kind and sizes.

    layers: their numbers, as text.
    part: of these layers, the "mixer" or the "experts".
    step: "prompt" or "decoding".
    implementation, reason: what runs, and why.
    """

    layers: str
    part: str
    step: str
    implementation: str
    reason: str


@lru_cache(maxsize=256)
def layer_kernels(
    model: Model, dtype: DTypeLike, batch_size: int, prompt_tokens: int, step_tokens: int, capacity: int
) -> tuple[LayerKernel, ...]:
    """For layers alike, what runs in prefill and in decoding.

    dtype: in which the model computes.
    batch_size: rows.
    prompt_tokens: of a chunk of a prompt.
    step_tokens: of a decoding step: 1, or the nodes of a draft.
    capacity: tokens of a row's cache.
    Raises NotImplementedError, with all reasons, where the model's execution asks for a kernel that does not fit.
    """
    rows = []
    for (part, layer), numbers in _alike(model.config).items():
        named = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}..{numbers[-1]} ({len(numbers)})"
        for step, num_tokens in (("prompt", prompt_tokens), ("decoding", step_tokens)):
            found = _selection(model, part, layer, batch_size, num_tokens, capacity, jnp.dtype(dtype))
            rows.append(LayerKernel(named, part, step, found.implementation, found.reason))
    return tuple(rows)


def check_kernels(model: Model, dtype: DTypeLike) -> None:
    """Raises NotImplementedError, with every layer's reasons, where kernels that were asked for do not fit."""
    if model.execution.implementation in (None, "xla"):
        return
    batch_size, prompt_tokens, capacity = _TYPICAL
    reasons: dict[str, None] = {}
    for part, layer in _alike(model.config):
        for num_tokens in (prompt_tokens, 1):
            try:
                _selection(model, part, layer, batch_size, num_tokens, capacity, jnp.dtype(dtype))
            except NotImplementedError as unsupported:
                reasons[str(unsupported).removesuffix(": use implementation='xla'")] = None
    if reasons:
        raise NotImplementedError(f"{'; '.join(reasons)}: load with implementation=None or 'xla'")


def _alike(config: ModelConfig) -> dict[tuple[str, Any], list[int]]:
    groups: dict[tuple[str, Any], list[int]] = {}
    for index, block in enumerate(config.blocks):
        groups.setdefault(("mixer", block.mixer.layer), []).append(index)
        if isinstance(fed := block.feed_forward_layer, MoEConfig):
            groups.setdefault(("experts", fed), []).append(index)
    return groups


def _selection(
    model: Model, part: str, layer: Any, batch_size: int, num_tokens: int, capacity: int, dtype: jnp.dtype
) -> KernelSelection:
    execution = _of_one_device(model.execution)
    if part == "experts":
        return layer.kernel(model.config.hidden_size, batch_size * num_tokens, dtype, execution)
    if model.invariant:
        return KernelSelection("xla", "the invariant mode runs no kernels")
    slots = capacity // model.execution.num_shards("S", capacity)
    return layer.kernel(batch_size, num_tokens, slots, dtype, execution)


def _of_one_device(execution: Execution) -> Execution:
    """What each device runs: where slots are split, attention runs on each as if it were alone with its own."""
    return execution if execution.num_shards("S") == 1 else execution.on_one_device
