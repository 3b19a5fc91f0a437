"""Runs `gather_decode` on Hopper GPUs: locates a cache's listed pages for the kernels of `decode/kernel_gpu.py`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.compat import aligned_rows
from decodax.kernels_pallas.decode.kernel_gpu import decode, unsupported_sizes
from decodax.kernels_pallas.decode.new_tokens import NewTokens
from decodax.kernels_pallas.decode.tiles_gpu import TILE_TOKENS, Tables
from decodax.kernels_pallas.selection import every_reason


@dataclass(frozen=True)
class _ListedTiles:
    """Tiles of a cache [slabs, S, H]: several short pages, or a piece of a long one.

    Tables: lists [slabs, M], their numbers of pages, lengths.
    """

    block_tokens: int

    @property
    def num_pieces(self) -> int:
        return max(1, TILE_TOKENS // self.block_tokens)

    def _slot(self, tables: Tables, slab: jax.Array, tile: jax.Array, number: int) -> jax.Array:
        """The first slot of a piece; after the list's end, of its last page."""
        index, count, _ = tables
        block_tokens = jnp.int32(self.block_tokens)
        listed = tile * TILE_TOKENS + number * min(self.block_tokens, TILE_TOKENS)
        entry = jnp.minimum(jax.lax.div(listed, block_tokens), jnp.maximum(count[slab] - 1, 0))
        return index[slab, entry] * self.block_tokens + jax.lax.rem(listed, block_tokens)

    def _num_filled(self, tables: Tables, slab: jax.Array, tile: jax.Array, number: int) -> jax.Array:
        """Number of a piece's tokens to attend to: none after the list's end, none after the row's length."""
        piece_tokens = TILE_TOKENS // self.num_pieces
        filled = jnp.clip(tables[2][slab] - self._slot(tables, slab, tile, number), 0, piece_tokens)
        is_listed = tile * TILE_TOKENS + number * piece_tokens < tables[1][slab] * self.block_tokens
        return jnp.where(is_listed, filled, 0)

    def piece(self, tables: Tables, slab: jax.Array, tile: jax.Array, number: int) -> tuple[Any, ...]:
        return slab, aligned_rows(self._slot(tables, slab, tile, number), TILE_TOKENS // self.num_pieces)

    def position(self, tables: Tables, slab: jax.Array, tile: jax.Array) -> jax.Array:
        raise NotImplementedError(
            "listed pages have no common order; queries that start at different positions do not fit"
        )

    def is_unmasked(self, tables: Tables, slab: jax.Array, tile: jax.Array) -> jax.Array:
        filled = jnp.int32(0)
        for i in range(self.num_pieces):
            filled = filled + self._num_filled(tables, slab, tile, i)
        return filled == TILE_TOKENS

    def is_filled(self, tables: Tables, slab: jax.Array, tile: jax.Array, token: jax.Array) -> jax.Array:
        piece_tokens = TILE_TOKENS // self.num_pieces
        end = self._num_filled(tables, slab, tile, 0)
        filled = token < end
        for i in range(1, self.num_pieces):
            start = i * piece_tokens
            end = start + self._num_filled(tables, slab, tile, i)
            filled = filled | ((token >= start) & (token < end))
        return filled

    may_be_read = is_filled


@every_reason
def unsupported_reason(
    query: Any, key: Any, value: Any, index: Any, new: NewTokens | None, *, block_tokens: int, interpret: bool
) -> Iterator[str | None]:
    """Every reason why the kernel does not support these operands."""
    if block_tokens % 8 or (TILE_TOKENS % block_tokens and block_tokens % TILE_TOKENS):
        yield (
            f"pages must have 8, 16, 32 or a multiple of {TILE_TOKENS} tokens (block_tokens), these have "
            f"{block_tokens}: a bulk copy of fewer is slower than the reads it saves"
        )
    yield unsupported_sizes(query, key, value, new, interpret=interpret)


def gather_decode(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S I"],
    index: Int[Array, "B K M"],
    count: Int[Array, "B K"],
    length: Int[Array, " B"],
    new: NewTokens | None,
    *,
    block_tokens: int,
    scale: float,
    softcap: float | None,
    sink_logits: Float[Array, " N"] | None,
    interpret: bool,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B T N"]]:
    """See `decodax.kernels_pallas.gather_decode.gather_decode`."""
    batch, num_kv_heads, capacity, _ = key.shape
    slabs = batch * num_kv_heads
    index = jnp.clip(index, 0, capacity // block_tokens - 1).reshape(slabs, -1)
    length = jnp.broadcast_to(length[:, None], (batch, num_kv_heads))
    return decode(
        query,
        key.reshape(slabs, capacity, -1),
        value.reshape(slabs, capacity, -1),
        (index, count.reshape(-1), length.reshape(-1)),
        (count * block_tokens + (TILE_TOKENS - 1)) // TILE_TOKENS,
        new,
        tiles=_ListedTiles(block_tokens),
        name="gather_decode",
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        interpret=interpret,
    )
