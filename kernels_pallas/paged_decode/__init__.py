"""Computes decode attention over a paged cache: `flash_decode` through page tables.

A cache is a pool of pages of 16 to 256 tokens; a table lists the pages of each row in the order of its tokens, one
table for all key-value heads or one per head (PagedAttention, arXiv 2309.06180).
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.decode.new_tokens import NewTokens, check_operands, check_range
from decodax.kernels_pallas.selection import Implementation, KernelSelection, select_in_folder

__all__ = ["NewTokens", "paged_decode", "select_paged_decode"]


def paged_decode(
    query: Float[Array, "B T N H"],
    key_pages: Float[Array, "P Kp A H"],
    value_pages: Float[Array, "P Kp A I"],
    table: Int[Array, "B Kt M"],
    length: Int[Array, "B Kt"],
    new: NewTokens | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    first: Int[Array, "B T"] | None = None,
    num_sink_tokens: int = 0,
    sink_logits: Float[Array, " N"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B T N"]]:
    """As `flash_decode`, where slot s of row b and key-value head k is in page `table[b, k, s // A]` at s % A.

    Of the K key-value heads, Kp are in one page (K: a page holds all heads; 1: a page belongs to one head), and Kt have
    a table and a length (K: each head its own; 1: one for all), so K is the larger of both.

    query, new: as for `flash_decode`.
    key_pages, value_pages: the cache.
    table: pages of each row; entries that no query needs (after the length; before the window and not of sink tokens)
        may be anything.
    length: cached tokens.
    scale, softcap, first, num_sink_tokens, sink_logits, implementation: as for `flash_decode`.

    Raises ValueError for operands that do not fit each other, lengths that the tables do not hold and needed pages
    outside 0..P - 1 (only if their values are known: inside `jit` they are clipped).
    Raises NotImplementedError if the implementation asked for does not support the operands.
    """
    num_pages, heads_per_page, page_tokens, head_size = key_pages.shape
    _, num_tables, pages_per_table = table.shape
    num_kv_heads = max(heads_per_page, num_tables)
    for name, count in (("heads in a page (Kp)", heads_per_page), ("tables per row (Kt)", num_tables)):
        if count not in (1, num_kv_heads):
            raise ValueError(f"{name} must be 1 or the number of key-value heads, {num_kv_heads}, got {count}")
    check_operands("paged_decode", query, num_kv_heads, head_size, value_pages.shape[3], new)
    if value_pages.shape[:3] != key_pages.shape[:3]:
        raise ValueError(
            f"pages of keys and values must agree in [P, Kp, A], got {key_pages.shape[:3]} and {value_pages.shape[:3]}"
        )
    if table.shape[0] != query.shape[0] or length.shape != table.shape[:2]:
        raise ValueError(
            f"tables [B, Kt, M] and lengths [B, Kt] must agree with the {query.shape[0]} rows of queries (B) and with "
            f"each other, got {table.shape} and {length.shape}"
        )
    capacity = pages_per_table * page_tokens
    if not 0 <= num_sink_tokens <= capacity:
        raise ValueError(f"num_sink_tokens must be in 0..{capacity} (a table's slots), got {num_sink_tokens}")
    check_range("length", length, 0, capacity, f"a table lists {pages_per_table} pages of {page_tokens} tokens")
    _check_pages(table, length, first, num_sink_tokens, page_tokens, num_pages)
    options: dict[str, Any] = {
        "scale": scale,
        "softcap": softcap,
        "first": first,
        "num_sink_tokens": num_sink_tokens,
        "sink_logits": sink_logits,
    }
    selection = select_paged_decode(query, key_pages, value_pages, table, new, implementation=implementation)
    table, length = jnp.clip(table, 0, num_pages - 1), jnp.clip(length, 0, capacity)
    operands = (query, key_pages, value_pages, table, length, new)
    if selection.backend == "xla":
        from decodax.kernels_pallas.paged_decode import reference

        return reference.paged_decode(*operands, **options)
    if selection.backend == "tpu":
        from decodax.kernels_pallas.paged_decode import kernel_tpu

        return kernel_tpu.paged_decode(*operands, **options, interpret=selection.interpret)
    from decodax.kernels_pallas.paged_decode import kernel_gpu

    return kernel_gpu.paged_decode(*operands, **options, interpret=selection.interpret)


def select_paged_decode(
    query: Any,
    key_pages: Any,
    value_pages: Any,
    table: Any,
    new: NewTokens | None = None,
    *,
    implementation: Implementation | None = None,
) -> KernelSelection:
    """The implementation of `paged_decode` for operands of these shapes and dtypes, and the reason."""
    return select_in_folder("paged_decode", implementation, query, key_pages, value_pages, table, new)


def _check_pages(table: Any, length: Any, first: Any, num_sink_tokens: int, page_tokens: int, num_pages: int) -> None:
    """Raises ValueError if a needed page is outside the pool; does nothing for traced values."""
    if any(isinstance(x, Tracer) for x in (table, length, first)):
        return
    start = np.arange(table.shape[2]) * page_tokens
    needed = start < np.asarray(length)[..., None]
    if first is not None:
        lowest = np.asarray(first).min(axis=1)[:, None, None]
        needed &= (start + page_tokens > lowest) | (start < num_sink_tokens)
    check_range("table", np.asarray(table)[needed], 0, num_pages - 1, "an entry that is read must be one of the pages")
