"""Computes attention on keys and values made from latents, where tokens or slots are split over devices.

Latents are sent, R + H numbers for a token, and not the keys and values that are made from them.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from decodax.core.partial_softmax import PartialSoftmax
from decodax.kernels_pallas.flash_prefill import flash_prefill
from decodax.layers.attention import expanded_kernels, over_context
from decodax.layers.attention.expanded_kernels import attend_in_kernels, merge_blocks, select_expanded
from decodax.layers.attention.expanded_xla import attend_expanded_in_xla
from decodax.layers.attention.expansion import Expansion
from decodax.layers.attention.implementations import AttentionImplementation, always_supported, on_one_device
from decodax.layers.attention.mask import Mask
from decodax.layers.attention.nonfinite import mask_nonfinite_latents
from decodax.layers.attention.over_context import Heads, OwnSlots, exchange, over_slots, over_tokens
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.latent import LatentCache, LatentUpdate

ON_ONE_DEVICE = {
    "kernel": AttentionImplementation(expanded_kernels.unsupported_reason, attend_in_kernels),
    "xla": AttentionImplementation(always_supported, attend_expanded_in_xla),
}


def slots_unsupported_reason(
    query: Any, update: Any, key_up: Any, value_up: Any, position: Any, mask: Mask, cache: Any, execution: Execution
) -> str | None:
    """Why `attend_over_slots` does not run; None if it does."""
    return over_context.slots_unsupported_reason(_heads(query), cache, execution)


def attend_over_slots(*operands: Any, execution: Execution, scale: float) -> tuple[Array, Array]:
    """On every device over its slots of the cache: as if it were alone with them."""
    own = on_one_device(ON_ONE_DEVICE, execution, scale=scale)
    return over_slots(own, ("B T N H", None, "N R", "N R"), execution)(*operands)


def tokens_unsupported_reason(
    query: Any, update: Any, key_up: Any, value_up: Any, position: Any, mask: Mask, cache: Any, execution: Execution
) -> str | None:
    """Why `attend_over_tokens` does not run; None if it does."""
    return over_context.tokens_unsupported_reason(query.shape[1], _heads(query), mask, cache, execution)


def attend_over_tokens(
    query: Array, update: LatentUpdate, *others: Any, execution: Execution, scale: float
) -> tuple[Array, Array]:
    """A chunk of a prompt of which every device has some tokens."""
    window = others[3].span(is_new=True).window
    options = {"scale": scale, "causal": True, "window": window}
    among_new = partial(_among_new, options=options, execution=execution)
    cached = partial(_cached, options=options, execution=execution)
    run = over_tokens(among_new, cached, ("B T N H", "B T R", "B T H", "N R", "N R"), execution)
    return run(query, update.latent, update.rope_key, *others)


def _among_new(
    query: Array,
    latent: Array,
    rope_key: Array,
    key_up: Array,
    value_up: Array,
    *,
    options: dict[str, Any],
    execution: Execution,
) -> PartialSoftmax:
    """The attention of a device's queries to all new tokens."""
    all_heads = query.shape[2]

    def block(query: Array, latent: Array, rope_key: Array, offset: Array) -> PartialSoftmax:
        num_heads = query.shape[2]  # Ulysses gives a device some of them
        own_key_up, own_value_up = _of_heads(key_up, value_up, num_heads, all_heads, execution)
        key, value = Expansion(own_key_up, own_value_up, num_heads)(latent[:, 0], rope_key[:, 0])
        rows = {"offset": jnp.broadcast_to(offset, query.shape[:1]), "implementation": execution.implementation}
        return PartialSoftmax(*flash_prefill(query, key, value, **rows, **options))

    sizes = {"result_size": value_up.shape[0] // all_heads, "window": options["window"]}
    latent, rope_key = mask_nonfinite_latents(latent, rope_key)
    return exchange(query, latent[:, None], rope_key[:, None], block, **sizes, execution=execution)


def _cached(
    query: Array,
    latent: Array,
    rope_key: Array,
    key_up: Array,
    value_up: Array,
    position: Array,
    mask: OwnSlots,
    cache: LatentCache,
    *,
    options: dict[str, Any],
    execution: Execution,
) -> PartialSoftmax:
    """The attention of all devices' queries to the slots of this one."""
    expand, value_size = Expansion(key_up, value_up, query.shape[2]), value_up.shape[0] // query.shape[2]
    alone = execution.on_one_device
    selection = select_expanded(query, value_size, mask, cache, alone)
    if selection.backend == "xla":
        none, up = LatentUpdate(latent[:, :0], rope_key[:, :0]), (key_up, value_up)
        run = partial(attend_expanded_in_xla, scale=options["scale"], execution=alone)
        return PartialSoftmax(*run(query, none, *up, position, mask, cache))
    # Queries come after all cached tokens; where the device's slots begin after them, there are none to read.
    first = jnp.maximum(position[:, 0] - mask.first, 0)
    shape = query.shape[:3]
    nothing = PartialSoftmax(jnp.zeros((*shape, value_size), jnp.float32), jnp.full(shape, -jnp.inf))
    return merge_blocks(nothing, query, expand, first, cache, {**options, "implementation": selection.implementation})


def _of_heads(key_up: Array, value_up: Array, num_heads: int, all_heads: int, execution: Execution) -> list[Array]:
    """The rows of W_uk and W_uv for the heads that this device has of all."""
    if num_heads == all_heads:
        return [key_up, value_up]
    device = jax.lax.axis_index(execution.mesh_axes("T"))
    sizes = (weight.shape[0] // all_heads * num_heads for weight in (key_up, value_up))
    return [
        jax.lax.dynamic_slice_in_dim(weight, device * size, size)
        for weight, size in zip((key_up, value_up), sizes, strict=True)
    ]


def _heads(query: Any) -> Heads:
    return Heads(query.shape[2], query.shape[2])
