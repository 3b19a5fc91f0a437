"""Computes attention on keys and values made from latents with `flash_prefill`.

The chunk itself comes first, then the cache block by block up to the longest row; the partial softmaxes are merged.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from decodax.core.partial_softmax import PartialSoftmax, in_float32, merge
from decodax.kernels_pallas.flash_prefill import flash_prefill, select_flash_prefill
from decodax.kernels_pallas.selection import KernelSelection, every_reason, select_kernel
from decodax.layers.attention.expansion import Expansion
from decodax.layers.attention.implementations import cache_unsupported_reason, heads_unsupported_reason
from decodax.layers.attention.mask import Mask
from decodax.layers.attention.nonfinite import mask_nonfinite_latents, of_own_tokens
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.latent import LatentCache, LatentUpdate
from decodax.layers.kv_cache.view import committed, num_staged

KERNEL_BLOCK_TOKENS = (1024, 512, 256, 128)  # of a cache, at a time: the first that divides it


def unsupported_reason(
    query: Any, update: Any, key_up: Any, value_up: Any, position: Any, mask: Mask, cache: Any, execution: Execution
) -> str | None:
    """Why no kernel takes the operands (arrays or their shapes); None if one does.

    Raises NotImplementedError if `execution` asks for a kernel that does not.
    """
    selection = select_expanded(query, value_up.shape[0] // query.shape[2], mask, cache, execution)
    return selection.reason if selection.backend == "xla" else None


def select_expanded(query: Any, value_size: int, mask: Mask, cache: Any, execution: Execution) -> KernelSelection:
    """The kernel for the operands (arrays or their shapes), or "xla", and why.

    Raises NotImplementedError if `execution` asks for a kernel that does not take them.
    """
    asked = execution.implementation
    selection = select_kernel("flash_prefill", asked, lambda backend: _operands_reason(query, mask, cache, execution))
    if selection.backend == "xla":
        return selection
    batch, num_queries, num_heads, size = query.shape
    num_heads //= execution.num_shards("N")
    sources = [num_queries] if cache is None else [num_queries, block_tokens(cache.capacity)]
    queries = jax.ShapeDtypeStruct((batch, num_queries, num_heads, size), query.dtype)
    selections = []
    for num_tokens in sources:
        key, value = (
            jax.ShapeDtypeStruct((batch, num_heads, num_tokens, size), query.dtype) for size in (size, value_size)
        )
        selections.append(select_flash_prefill(queries, key, value, implementation=asked))
    return next((selection for selection in selections if selection.backend == "xla"), selections[0])


@every_reason
def _operands_reason(query: Any, mask: Mask, cache: Any, execution: Execution) -> Iterator[str | None]:
    """Every reason why no kernel takes such operands, whatever their sizes."""
    bare = committed(cache)
    if num_staged(cache):
        yield "staged tokens need a cache before them and few new ones after them"
    if not (mask.span(is_new=True) and mask.span(is_new=False)):
        yield f"its mask ({type(mask).__name__}) is no chain with a window"
    yield heads_unsupported_reason(query.shape[2], execution)
    yield cache_unsupported_reason(bare, "latent_slots", query)
    if bare is not None and block_tokens(bare.capacity) is None:
        yield f"the cache's capacity must be a multiple of {KERNEL_BLOCK_TOKENS[-1]} tokens, got {bare.capacity}"


def block_tokens(capacity: int) -> int | None:
    """How many cached tokens the kernel gets at a time; None where no number divides the cache."""
    sizes = (min(capacity, KERNEL_BLOCK_TOKENS[0]), *KERNEL_BLOCK_TOKENS)
    return next((size for size in sizes if capacity % size == 0), None)


def attend_in_kernels(
    query: Float[Array, "B T N I_plus_H"],
    update: LatentUpdate,
    key_up: Float[Array, "NI R"],
    value_up: Float[Array, "NJ R"],
    position: Int[Array, "B T"],
    mask: Mask,
    cache: Any,
    *,
    scale: float,
    execution: Execution,
) -> tuple[Float[Array, "B T N J"], Float32[Array, "B T N"]]:
    """The operands are those of `attend_expanded`."""
    span = mask.span(is_new=True)
    assert span is not None  # `unsupported_reason` has seen to it
    options = {"scale": scale, "causal": True, "window": span.window, "implementation": execution.implementation}

    def run(query, latent, rope_key, key_up, value_up, first, cache) -> tuple[Array, Array]:
        expand = Expansion(key_up, value_up, query.shape[2])
        start, end = (jnp.full_like(first, index) for index in (0, query.shape[1]))
        output, lse = flash_prefill(query, *expand(latent, rope_key), offset=start, length=end, **options)
        if cache is None:
            return output, lse
        own = in_float32(PartialSoftmax(output, of_own_tokens(lse)))
        merged = merge_blocks(own, query, expand, first, cache, options)
        return merged.output.astype(output.dtype), merged.lse

    axes = ("B T N H", "B T R", "B T H", "N R", "N R", "B", None)
    run = execution.per_device(run, axes, ("B T N H", "B T N"))
    new = mask_nonfinite_latents(update.latent, update.rope_key)
    return run(query, *new, key_up, value_up, position[:, 0], cache)


def merge_blocks(
    merged: PartialSoftmax,
    query: Array,
    expand: Expansion,
    first: Int[Array, " B"],
    cache: LatentCache,
    options: dict[str, Any],
) -> PartialSoftmax:
    """A partial softmax with those of the cache merged into it, block by block.

    merged: in float32.
    query: of a chunk.
    expand: makes keys and values.
    first: how many slots come before the first query.
    cache: of latents.
    options: of `flash_prefill`.
    """
    num_tokens = block_tokens(cache.capacity)
    assert num_tokens is not None  # `unsupported_reason` has seen to it

    def step(block: Int[Array, ""], merged: PartialSoftmax) -> PartialSoftmax:
        start = block * num_tokens
        latent, rope_key, *_ = cache.read_latents(start, num_tokens)
        # A row that ended before this block attends to none of it, whatever its offset.
        offset, length = jnp.maximum(first - start, 0), jnp.clip(cache.length - start, 0, num_tokens)
        partial = flash_prefill(query, *expand(latent, rope_key), offset=offset, length=length, **options)
        return merge(merged, PartialSoftmax(*partial))

    num_blocks = (jnp.max(cache.length) + num_tokens - 1) // num_tokens
    return jax.lax.fori_loop(0, num_blocks, step, merged)
