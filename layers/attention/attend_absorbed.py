"""Computes latent attention on the latents themselves, for few new tokens: a decoding step, draft tokens, a token tree.

A head's key is W_uk c and its value W_uv c, for the latent c of a token (DeepSeek-V2, arXiv 2405.04434, section 2.1).
With W_uk multiplied into the query, and W_uv into the output, all heads attend to the latents as one key-value head:
score = (query_latent . latent + query_rope . rope_key) scale, output = the weighted sum of latents.

`mla_decode` computes this where it takes the operands, and reads every latent once; plain JAX does everywhere else.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from decodax.core.blockwise_attention import loop_tokens
from decodax.kernels_pallas.decode.new_tokens import MAX_NEW_TOKENS
from decodax.kernels_pallas.mla_decode import MAX_QUERIES, NewLatents, mla_decode, select_mla_decode
from decodax.kernels_pallas.selection import KernelSelection, every_reason, select_kernel
from decodax.layers.attention import over_context
from decodax.layers.attention.attend_kernels import allowed_among_new
from decodax.layers.attention.attend_xla import attend_in_xla, is_for_cpu
from decodax.layers.attention.implementations import (
    AttentionImplementation,
    always_supported,
    attention_by,
    cache_unsupported_reason,
    heads_unsupported_reason,
    on_one_device,
)
from decodax.layers.attention.mask import Mask, Span
from decodax.layers.attention.over_context import Heads, over_slots
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.full import KVUpdate
from decodax.layers.kv_cache.latent import LatentUpdate
from decodax.layers.kv_cache.staged import Staged
from decodax.layers.kv_cache.view import CacheView, committed, num_staged, part


def attend_absorbed(
    query_latent: Float[Array, "B T N R"],
    query_rope: Float[Array, "B T N H"],
    update: LatentUpdate,
    position: Int[Array, "B T"],
    mask: Mask,
    cache: CacheView,
    *,
    scale: float,
    execution: Execution,
) -> Float[Array, "B T N R"]:
    """The attention output of each query, a weighted sum of latents, over cached and new tokens.

    query_latent: queries without position, multiplied by W_uk.
    query_rope: queries with position.
    update: latents and rope keys of the T new tokens.
    position: of the new tokens.
    mask: which tokens a query attends to; every query must attend to itself.
    cache: latents of earlier tokens. Tokens staged with it are new ones that come before those of this forward.
    scale: of the scores.
    execution: which kernels run, over which devices.

    Raises NotImplementedError if `execution` asks for a kernel that does not take these operands.
    """
    operands = (query_latent, query_rope, update, position, mask, cache)
    return attention_by(IMPLEMENTATIONS, operands, execution, scale=scale)(*operands)[0]


def unsupported_reason(
    query_latent: Any, query_rope: Any, update: Any, position: Any, mask: Mask, cache: Any, execution: Execution
) -> str | None:
    """Why `mla_decode` does not take the operands (arrays or their shapes); None if it does.

    Raises NotImplementedError if `execution` asks for it, and it does not.
    """
    selection = select_absorbed(query_latent, query_rope, mask, cache, execution)
    return selection.reason if selection.backend == "xla" else None


def select_absorbed(
    query_latent: Any, query_rope: Any, mask: Mask, cache: Any, execution: Execution
) -> KernelSelection:
    """The kernel for the operands (arrays or their shapes), or "xla", and why.

    Raises NotImplementedError if `execution` asks for a kernel that does not take them.
    """
    asked = execution.implementation
    selection = select_kernel(
        "mla_decode", asked, lambda backend: _operands_reason(query_latent, mask, cache, execution)
    )
    if selection.backend == "xla":
        return selection
    batch, num_queries, num_heads, _ = query_latent.shape
    bare, num_new = committed(cache), num_queries + num_staged(cache)

    def part(query: Any) -> jax.ShapeDtypeStruct:
        heads = num_heads // execution.num_shards("N")
        return jax.ShapeDtypeStruct((batch, min(num_queries, MAX_QUERIES), heads, query.shape[3]), query.dtype)

    def new(cached: Any) -> Any:
        return jax.ShapeDtypeStruct((batch, num_new, cached.shape[2]), cached.dtype)

    allowed: Any = jax.ShapeDtypeStruct((batch, min(num_queries, MAX_QUERIES), num_new), bool)
    latent, rope_key, _ = bare.latent_slots
    latents = NewLatents(new(latent), new(rope_key), allowed)
    return select_mla_decode(part(query_latent), part(query_rope), latent, rope_key, latents, implementation=asked)


@every_reason
def _operands_reason(query_latent: Any, mask: Mask, cache: Any, execution: Execution) -> Iterator[str | None]:
    """Every reason why no kernel takes such operands, whatever their sizes."""
    yield cache_unsupported_reason(committed(cache), "latent_slots", query_latent)
    num_new = query_latent.shape[1] + num_staged(cache)
    if num_new > MAX_NEW_TOKENS:
        yield f"it takes at most {MAX_NEW_TOKENS} new and staged tokens, these are {num_new}"
    if mask.span(is_new=False) != Span(None):
        yield f"its mask ({type(mask).__name__}) does not let every query read all cached tokens"
    yield heads_unsupported_reason(query_latent.shape[2], execution)


def attend_in_kernels(
    query_latent: Float[Array, "B T N R"],
    query_rope: Float[Array, "B T N H"],
    update: LatentUpdate,
    position: Int[Array, "B T"],
    mask: Mask,
    cache: Any,
    *,
    scale: float,
    execution: Execution,
) -> tuple[Float[Array, "B T N R"], Float32[Array, "B T N"]]:
    """`mla_decode`, for MAX_QUERIES queries at a time.

    With 16 heads they are more rows than a cached token's bytes pay for (see there), so reading the cache again for the
    next of them costs no time.
    """
    key_position, bare, num_queries = position, committed(cache), position.shape[1]
    if isinstance(cache, Staged):
        update = update.after(cache.update)
        key_position = jnp.concatenate([cache.position, position], axis=1)
    allowed = allowed_among_new(mask, position, key_position)
    attend = partial(mla_decode, scale=scale, implementation=execution.implementation)

    def run(
        query_latent, query_rope, latent, rope_key, length, new_latent, new_rope_key, allowed
    ) -> tuple[Array, Array]:
        def some(start: int) -> tuple[Array, Array]:
            queries = slice(start, min(start + MAX_QUERIES, num_queries))
            new = NewLatents(new_latent, new_rope_key, allowed[:, queries])
            return attend(query_latent[:, queries], query_rope[:, queries], latent, rope_key, length, new)

        outputs, lses = zip(*(some(start) for start in range(0, num_queries, MAX_QUERIES)), strict=True)
        return jnp.concatenate(outputs, axis=1), jnp.concatenate(lses, axis=1)

    axes = ("B T N R", "B T N H", "B S R", "B S H", "B", "B S R", "B S H", "B T S")
    run = execution.per_device(run, axes, ("B T N R", "B T N"))
    slots, new = bare.latent_slots, (update.latent, update.rope_key)
    return run(query_latent, query_rope, slots.first, slots.second, slots.length, *new, allowed)


def attend_absorbed_in_xla(
    query_latent: Float[Array, "B T N R"],
    query_rope: Float[Array, "B T N H"],
    update: LatentUpdate,
    position: Int[Array, "B T"],
    mask: Mask,
    cache: Any,
    *,
    scale: float,
    execution: Execution,
) -> tuple[Float[Array, "B T N R"], Float32[Array, "B T N"]]:
    """Attention with one key-value head, whose keys and values are latents with their rope keys."""

    def one_head(update: LatentUpdate) -> KVUpdate:
        tokens = jnp.concatenate([update.latent, update.rope_key], axis=2)[:, None]
        return KVUpdate(tokens, tokens)

    query = jnp.concatenate([query_latent, query_rope], axis=3)
    cache = part(cache, lambda latents: latents, one_head)
    output, lse = attend_in_blocks(query, one_head(update), position, mask, cache, scale=scale, execution=execution)
    return output[..., : query_latent.shape[3]], lse


def attend_in_blocks(
    query: Float[Array, "B T N H"],
    new: KVUpdate,
    position: Int[Array, "B T"],
    mask: Mask,
    cache: CacheView,
    *,
    scale: float,
    execution: Execution,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """`attend_in_xla` for a cache whose keys are made when it is read: block by block, and never all of it at once.

    With 16,384 latents on CPU, a step that reads them all takes 4.5 times as long as one that reads blocks of them.
    """
    options = {"scale": scale, "softcap": None, "block_tokens": loop_tokens(is_for_cpu(execution))}
    return attend_in_xla(query, new.key, new.value, position, mask, cache, execution=execution, **options)


def slots_unsupported_reason(
    query_latent: Any, query_rope: Any, update: Any, position: Any, mask: Mask, cache: Any, execution: Execution
) -> str | None:
    """Why `attend_over_slots` does not run; None if it does."""
    num_heads = query_latent.shape[2]
    return over_context.slots_unsupported_reason(Heads(num_heads, num_heads), cache, execution)


def attend_over_slots(*operands: Any, execution: Execution, scale: float) -> tuple[Array, Array]:
    """On every device over its slots of the cache: as if it were alone with them."""
    own = on_one_device(ON_ONE_DEVICE, execution, scale=scale)
    return over_slots(own, ("B T N R", "B T N H", None), execution)(*operands)


ON_ONE_DEVICE = {
    "kernel": AttentionImplementation(unsupported_reason, attend_in_kernels),
    "xla": AttentionImplementation(always_supported, attend_absorbed_in_xla),
}
IMPLEMENTATIONS = {
    "split slots": AttentionImplementation(slots_unsupported_reason, attend_over_slots, needs_mesh=True),
    **ON_ONE_DEVICE,
}
