"""Computes attention with the kernels of `kernels_pallas/`, for the operands that they take.

Up to 64 new tokens per row after a cache (a token being decoded, a chain of draft tokens, a tree) are one
`flash_decode`, over the cache and the new tokens. All else is a chunk of a prompt: `flash_prefill` runs over the chunk
itself and over the cached prefix, and the two partial softmaxes are merged.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.core.partial_softmax import PartialSoftmax, merge
from decodax.kernels_pallas.decode.new_tokens import MAX_STEP_TOKENS
from decodax.kernels_pallas.flash_decode import NewTokens, flash_decode, select_flash_decode
from decodax.kernels_pallas.flash_prefill import flash_prefill, select_flash_prefill
from decodax.kernels_pallas.selection import KernelSelection, every_reason, select_kernel
from decodax.layers.attention.attend_xla import staged_and_new
from decodax.layers.attention.implementations import cache_unsupported_reason
from decodax.layers.attention.mask import Mask, Tokens
from decodax.layers.attention.nonfinite import mask_nonfinite, of_own_tokens
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.view import CacheView, committed, num_staged

LANES = 128  # of a TPU
_KEYS = "B K S H"


def unsupported_reason(
    query: Any, key: Any, value: Any, position: Any, mask: Mask, cache: Any, execution: Execution
) -> str | None:
    """Why no kernel takes the operands (arrays or their shapes); None if one does.

    Raises NotImplementedError if `execution` asks for a kernel that does not.
    """
    selection = select_attention(query, key, value, mask, cache, execution)
    return selection.reason if selection.backend == "xla" else None


def select_attention(
    query: Any, key: Any, value: Any, mask: Mask, cache: CacheView, execution: Execution
) -> KernelSelection:
    """The kernel for the operands (arrays or their shapes), or "xla", and why.

    Raises NotImplementedError if `execution` asks for a kernel that does not take them.
    """
    asked, is_step = execution.implementation, _is_step(query, cache)

    def reason_against(backend: str) -> str | None:
        found = _operands_reason(query, key, mask, cache, execution)
        if found is None and backend == "tpu" and asked is None and is_step and key.shape[3] % LANES:
            # Seen in programs compiled for v5e: what writes the cache and what reads it want it in different layouts.
            return f"XLA would copy caches of head size {key.shape[3]}, no multiple of {LANES}, at every step"
        return found

    selection = select_kernel("flash_decode" if is_step else "flash_prefill", asked, reason_against)
    if selection.backend == "xla":
        return selection
    query_part = _part(query, "B T N H", execution)
    own = _part(key, _KEYS, execution), _part(value, _KEYS, execution)
    bare: Any = committed(cache)
    sources = [own]
    if bare is not None:
        sources.append((_part(bare.slots.first, _KEYS, execution), _part(bare.slots.second, _KEYS, execution)))
    if is_step:
        tokens = _new_tokens(own, query.shape[1], num_staged(cache) + query.shape[1])
        return select_flash_decode(query_part, *sources[-1], tokens, implementation=asked)
    selections = [select_flash_prefill(query_part, *source, implementation=asked) for source in sources]
    return next((selection for selection in selections if selection.backend == "xla"), selections[0])


@every_reason
def _operands_reason(query: Any, key: Any, mask: Mask, cache: Any, execution: Execution) -> Iterator[str | None]:
    """Every reason why no kernel takes such operands, whatever their sizes."""
    is_step = _is_step(query, cache)
    yield cache_unsupported_reason(committed(cache), "slots", query)
    if num_staged(cache) and not is_step:
        yield f"staged tokens need a cache before them and at most {MAX_STEP_TOKENS} new ones after them"
    if mask.span(is_new=False) is None or not (is_step or mask.span(is_new=True)):
        yield f"its mask ({type(mask).__name__}) is no chain with a window"
    num_heads, num_kv_heads = query.shape[2], key.shape[1]
    num_shards, num_kv_shards = execution.num_shards("N"), execution.num_shards("K", num_kv_heads)
    if num_heads % num_shards or num_kv_shards not in (num_shards, num_kv_heads):
        yield f"{num_heads} heads for {num_kv_heads} of keys and values do not divide over {num_shards} devices"


def _is_step(query: Any, cache: Any) -> bool:
    """Whether it is a call of `flash_decode`: few new tokens, after a cache."""
    return query.shape[1] <= MAX_STEP_TOKENS and committed(cache) is not None


def _part(operand: Any, axes: str, execution: Execution) -> jax.ShapeDtypeStruct:
    """The shape of a device's share of an operand: of its rows and of its heads."""
    return jax.ShapeDtypeStruct(execution.shard_shape(operand.shape, axes), operand.dtype)


def _new_tokens(own: tuple[Any, Any], num_queries: int, num_new: int) -> NewTokens:
    """The shapes of the new tokens, staged ones included."""
    key, value = (jax.ShapeDtypeStruct((*x.shape[:2], num_new, x.shape[3]), x.dtype) for x in own)
    allowed = jax.ShapeDtypeStruct((key.shape[0], num_queries, num_new), bool)
    shapes: list[Any] = [key, value, allowed]
    return NewTokens(*shapes)


def attend_in_kernels(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    position: Int[Array, "B T"],
    mask: Mask,
    cache: Any,
    *,
    scale: float,
    softcap: float | None,
    execution: Execution,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """What `attend_in_xla` gives, for operands that `unsupported_reason` says nothing against."""
    options = {"scale": scale, "softcap": softcap, "implementation": execution.implementation}
    attention = _step if _is_step(query, cache) else _chunk
    return attention(query, key, value, position, mask, cache, options, execution)


def _step(
    query, key, value, position, mask, cache, options: dict[str, Any], execution: Execution
) -> tuple[Array, Array]:
    """The new tokens of a decoding step, and staged ones before them, in one kernel with the cache."""
    bare = committed(cache)
    new = staged_and_new(key, value, position, cache)
    key, value = mask_nonfinite(new.key, new.value)
    allowed = allowed_among_new(mask, position, new.position)
    first = None if mask.span(is_new=False).window is None else mask.first_visible(position)

    def run(query, cached_key, cached_value, length, key, value, allowed, first) -> tuple[Array, Array]:
        tokens = NewTokens(key, value, allowed)
        return flash_decode(query, cached_key, cached_value, length, tokens, first=first, **options)

    per_query = None if first is None else "B T"
    axes = ("B T N H", _KEYS, _KEYS, "B", _KEYS, _KEYS, "B T S", per_query)
    run = execution.per_device(run, axes, ("B T N H", "B T N"))
    slots = bare.slots
    return run(query, slots.first, slots.second, slots.length, key, value, allowed, first)


def allowed_among_new(mask: Mask, position: Int[Array, "B T"], key_position: Int[Array, "B U"]) -> Bool[Array, "B T U"]:
    """Which of the staged and new tokens each new token attends to, as the decode kernels take it."""
    allowed = mask.allows(Tokens(position, is_new=True), Tokens(key_position, is_new=True))
    return jnp.broadcast_to(allowed, (*position.shape, key_position.shape[1]))


def _chunk(
    query, key, value, position, mask, cache, options: dict[str, Any], execution: Execution
) -> tuple[Array, Array]:
    """A chunk of a prompt; it is a chain, so each token is one position after the token before it."""
    window = mask.span(is_new=True).window

    def run(query, key, value, offset, length) -> tuple[Array, Array]:
        rows = {"offset": offset, "length": length, "causal": True, "window": window}
        return flash_prefill(query, key, value, **rows, **options)

    run = execution.per_device(run, ("B T N H", _KEYS, _KEYS, "B", "B"), ("B T N H", "B T N"))
    batch, num_new = position.shape
    start, end = (jnp.full(batch, index, jnp.int32) for index in (0, num_new))
    output, lse = run(query, *mask_nonfinite(key, value), start, end)
    if cache is None:
        return output, lse
    slots = cache.slots
    cached = run(query, slots.first, slots.second, position[:, 0], slots.length)
    merged = merge(PartialSoftmax(output, of_own_tokens(lse)), PartialSoftmax(*cached))
    return merged.output.astype(output.dtype), merged.lse
