"""Computes decode attention over selected pages or tokens of a contiguous cache, a list per row and key-value head.

For every method that selects the cached tokens of a step (Quest, arXiv 2406.10774; TidalDecode, arXiv 2410.05076): the
method makes the lists, and the work is proportional to their length.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.decode.new_tokens import NewTokens, check_operands, check_range
from decodax.kernels_pallas.selection import Implementation, KernelSelection, select_in_folder

__all__ = ["NewTokens", "gather_decode", "select_gather_decode"]


def gather_decode(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S I"],
    index: Int[Array, "B K M"],
    count: Int[Array, "B K"],
    length: Int[Array, " B"],
    new: NewTokens | None = None,
    *,
    block_tokens: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: Float[Array, " N"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B T N"]]:
    """As `flash_decode`, but each key-value head attends only to the cached slots of the pages in its list.

    query, key, value, length, new: as for `flash_decode`; slots from `length` on are masked even if listed.
    index: `index[b, k, :count[b, k]]` lists pages, in any order, none of them twice; the other entries may be anything.
    count: listed pages.
    block_tokens: page i is the slots i * block_tokens .. (i + 1) * block_tokens - 1 (1: a list of tokens).
    scale, softcap, sink_logits, implementation: as for `flash_decode`.

    Raises ValueError for operands that do not fit each other, counts outside 0..M, lengths outside 0..S and listed
    pages outside the cache (only if their values are known: inside `jit` they are clipped).
    Raises NotImplementedError if the implementation asked for does not support the operands.
    """
    check_operands("gather_decode", query, key.shape[1], key.shape[3], value.shape[3], new)
    capacity = key.shape[2]
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"keys and values must agree in [B, K, S], got {key.shape[:3]} and {value.shape[:3]}")
    if block_tokens < 1 or capacity % block_tokens:
        raise ValueError(f"block_tokens must divide the cache's {capacity} slots (S), got {block_tokens}")
    if index.shape[:2] != key.shape[:2] or count.shape != key.shape[:2]:
        raise ValueError(
            f"lists [B, K, M] and counts [B, K] must have the cache's rows and heads, {key.shape[:2]}, got "
            f"{index.shape} and {count.shape}"
        )
    check_range("count", count, 0, index.shape[2], "a list holds no more pages (M)")
    check_range("length", length, 0, capacity, "the cache holds no more tokens (S)")
    last = capacity // block_tokens - 1
    if not any(isinstance(x, Tracer) for x in (index, count)):
        listed = np.arange(index.shape[2]) < np.asarray(count)[..., None]
        check_range("index", np.asarray(index)[listed], 0, last, f"the cache has pages of {block_tokens} tokens")
    options: dict[str, Any] = {
        "block_tokens": block_tokens,
        "scale": scale,
        "softcap": softcap,
        "sink_logits": sink_logits,
    }
    selection = select_gather_decode(
        query, key, value, index, new, block_tokens=block_tokens, implementation=implementation
    )
    index, count = jnp.clip(index, 0, last), jnp.clip(count, 0, index.shape[2])
    operands = (query, key, value, index, count, jnp.clip(length, 0, capacity), new)
    if selection.backend == "xla":
        from decodax.kernels_pallas.gather_decode import reference

        return reference.gather_decode(*operands, **options)
    if selection.backend == "tpu":
        from decodax.kernels_pallas.gather_decode import kernel_tpu

        return kernel_tpu.gather_decode(*operands, **options, interpret=selection.interpret)
    from decodax.kernels_pallas.gather_decode import kernel_gpu

    return kernel_gpu.gather_decode(*operands, **options, interpret=selection.interpret)


def select_gather_decode(
    query: Any,
    key: Any,
    value: Any,
    index: Any,
    new: NewTokens | None = None,
    *,
    block_tokens: int,
    implementation: Implementation | None = None,
) -> KernelSelection:
    """The implementation of `gather_decode` for operands of these shapes and dtypes, and the reason."""
    return select_in_folder("gather_decode", implementation, query, key, value, index, new, block_tokens=block_tokens)
