"""Computes attention over keys and values whose tokens, slots or heads are split over devices.

Each device computes its share as if it were alone, with a kernel or in plain JAX (`ON_ONE_DEVICE`); `over_context.py`
says what is sent and merged.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from decodax.core.partial_softmax import PartialSoftmax
from decodax.kernels_pallas.flash_prefill import flash_prefill
from decodax.layers.attention import attend_kernels, over_context
from decodax.layers.attention.attend_kernels import attend_in_kernels, select_attention
from decodax.layers.attention.attend_xla import attend_in_xla
from decodax.layers.attention.implementations import AttentionImplementation, always_supported, on_one_device
from decodax.layers.attention.mask import Mask
from decodax.layers.attention.nonfinite import mask_nonfinite
from decodax.layers.attention.over_context import Heads, OwnSlots, exchange, over_heads, over_slots, over_tokens
from decodax.layers.execution import Execution

ON_ONE_DEVICE = {
    "kernel": AttentionImplementation(attend_kernels.unsupported_reason, attend_in_kernels),
    "xla": AttentionImplementation(always_supported, attend_in_xla),
}
_AXES = ("B T N H", "B K T H", "B K T H")


def attend_over_heads(*operands: Any, execution: Execution, **options: Any) -> tuple[Array, Array]:
    """On every device with its query heads, and the key-value heads, some held in copies, that they attend to."""
    own = on_one_device(ON_ONE_DEVICE, execution, **options)
    return over_heads(own, _AXES, execution)(*operands)


def attend_over_slots(*operands: Any, execution: Execution, **options: Any) -> tuple[Array, Array]:
    """On every device over its slots of the cache: as if it were alone with them."""
    own = on_one_device(ON_ONE_DEVICE, execution, **options)
    return over_slots(own, _AXES, execution)(*operands)


def attend_over_tokens(*operands: Any, execution: Execution, **options: Any) -> tuple[Array, Array]:
    """A chunk of a prompt of which every device has some tokens."""
    window = operands[4].span(is_new=True).window
    among_new = partial(_among_new, window=window, execution=execution, **options)
    cached = partial(_cached, window=window, execution=execution, **options)
    return over_tokens(among_new, cached, _AXES, execution)(*operands)


def _among_new(
    query: Array, key: Array, value: Array, *, window: int | None, execution: Execution, **options: Any
) -> PartialSoftmax:
    """The attention of a device's queries to all new tokens."""

    def block(query: Array, key: Array, value: Array, offset: Array) -> PartialSoftmax:
        rows = {"offset": jnp.broadcast_to(offset, query.shape[:1]), "causal": True, "window": window}
        run = partial(flash_prefill, **rows, **options, implementation=execution.implementation)
        return PartialSoftmax(*run(query, key, value))

    sizes = {"result_size": value.shape[3], "window": window}
    return exchange(query, *mask_nonfinite(key, value), block, **sizes, execution=execution)


def _cached(
    query: Array,
    key: Array,
    value: Array,
    position: Array,
    mask: OwnSlots,
    cache: Any,
    *,
    window: int | None,
    execution: Execution,
    **options: Any,
) -> PartialSoftmax:
    """The attention of all devices' queries to the slots of this one."""
    alone = execution.on_one_device
    new = jax.ShapeDtypeStruct((*key.shape[:2], query.shape[1], key.shape[3]), key.dtype)
    selection = select_attention(query, new, new, mask, cache, alone)
    if selection.backend == "xla":
        none = key[:, :, :0], value[:, :, :0]
        return PartialSoftmax(*attend_in_xla(query, *none, position, mask, cache, execution=alone, **options))
    # Queries come after all cached tokens; where the device's slots begin after them, there are none to read.
    cached_key, cached_value, length = cache.slots
    rows = {"offset": jnp.maximum(position[:, 0] - mask.first, 0), "length": length, "window": window}
    run = partial(flash_prefill, causal=True, **rows, **options, implementation=selection.implementation)
    return PartialSoftmax(*run(query, cached_key, cached_value))


def tokens_unsupported_reason(
    query: Any, key: Any, value: Any, position: Any, mask: Mask, cache: Any, execution: Execution
) -> str | None:
    """Why `attend_over_tokens` does not run; None if it does."""
    return over_context.tokens_unsupported_reason(query.shape[1], _heads(query, key), mask, cache, execution)


def slots_unsupported_reason(
    query: Any, key: Any, value: Any, position: Any, mask: Mask, cache: Any, execution: Execution
) -> str | None:
    """Why `attend_over_slots` does not run; None if it does."""
    return over_context.slots_unsupported_reason(_heads(query, key), cache, execution)


def heads_unsupported_reason(
    query: Any, key: Any, value: Any, position: Any, mask: Mask, cache: Any, execution: Execution
) -> str | None:
    """Why `attend_over_heads` does not run; None if it does."""
    return over_context.heads_unsupported_reason(_heads(query, key), cache, execution)


def _heads(query: Any, key: Any) -> Heads:
    return Heads(query.shape[2], key.shape[1])
