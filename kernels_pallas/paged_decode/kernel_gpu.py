"""Runs `paged_decode` on Hopper GPUs: locates a paged cache's tiles for the kernels of `decode/kernel_gpu.py`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.compat import aligned_rows
from decodax.kernels_pallas.decode.kernel_gpu import decode, unsupported_sizes
from decodax.kernels_pallas.decode.new_tokens import NewTokens
from decodax.kernels_pallas.decode.tiles_gpu import TILE_TOKENS, OrderedTiles, Tables, ordered
from decodax.kernels_pallas.selection import every_reason


@dataclass(frozen=True)
class _PagedTiles(OrderedTiles):
    """Tiles of pages [P, Kp, A, H]: several short pages, or a piece of a long one.

    The last table holds the pages [slabs, M] in the order of tokens.
    """

    page_tokens: int
    num_kv_heads: int
    heads_per_page: int

    @property
    def num_pieces(self) -> int:
        return max(1, TILE_TOKENS // self.page_tokens)

    def piece(self, tables: Tables, slab: jax.Array, tile: jax.Array, number: int) -> tuple[Any, ...]:
        """As in `Tiles`; after the row's last page, that page is read again, and masked."""
        pages, last = tables[-1], jnp.maximum(tables[0][slab] - 1, 0)
        piece_tokens = min(self.page_tokens, TILE_TOKENS)
        position = self.position(tables, slab, tile) + number * piece_tokens
        page_tokens = jnp.int32(self.page_tokens)
        entry = jnp.minimum(jax.lax.div(position, page_tokens), jax.lax.div(last, page_tokens))
        head = 0 if self.heads_per_page == 1 else jax.lax.rem(slab, jnp.int32(self.num_kv_heads))
        if self.page_tokens == piece_tokens:
            return pages[slab, entry], head, pl.ds(0, piece_tokens)
        return pages[slab, entry], head, aligned_rows(jax.lax.rem(position, page_tokens), piece_tokens)


@every_reason
def unsupported_reason(
    query: Any, key_pages: Any, value_pages: Any, table: Any, new: NewTokens | None, *, interpret: bool
) -> Iterator[str | None]:
    """Every reason why the kernel does not support these operands."""
    page_tokens = key_pages.shape[2]
    if page_tokens % 8 or (TILE_TOKENS % page_tokens and page_tokens % TILE_TOKENS):
        yield f"pages must have 8, 16, 32 or a multiple of {TILE_TOKENS} tokens (A), these have {page_tokens}"
    yield unsupported_sizes(query, key_pages, value_pages, new, interpret=interpret)


def paged_decode(
    query: Float[Array, "B T N H"],
    key_pages: Float[Array, "P Kp A H"],
    value_pages: Float[Array, "P Kp A I"],
    table: Int[Array, "B Kt M"],
    length: Int[Array, "B Kt"],
    new: NewTokens | None,
    *,
    scale: float,
    softcap: float | None,
    first: Int[Array, "B T"] | None,
    num_sink_tokens: int,
    sink_logits: Float[Array, " N"] | None,
    interpret: bool,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B T N"]]:
    """See `decodax.kernels_pallas.paged_decode.paged_decode`."""
    num_pages, heads_per_page, page_tokens, _ = key_pages.shape
    batch, num_tables, pages_per_table = table.shape
    num_kv_heads = max(heads_per_page, num_tables)
    length = jnp.broadcast_to(length, (batch, num_kv_heads))
    tables, num_tiles = ordered(length, first, num_sink_tokens)
    pages = jnp.broadcast_to(jnp.clip(table, 0, num_pages - 1), (batch, num_kv_heads, pages_per_table))
    return decode(
        query,
        key_pages,
        value_pages,
        (*tables, pages.reshape(-1, pages_per_table)),
        num_tiles,
        new,
        tiles=_PagedTiles(num_sink_tokens, first is not None, None, page_tokens, num_kv_heads, heads_per_page),
        name="paged_decode",
        scale=scale,
        softcap=softcap,
        first=first,
        num_sink_tokens=num_sink_tokens,
        sink_logits=sink_logits,
        interpret=interpret,
    )
