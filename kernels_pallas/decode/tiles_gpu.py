"""Locates the tiles of a cache for the GPU decode kernels; here for caches in the order of positions.

Of each row and key-value head (a slab) the kernels read the tiles of the sink tokens, and those from the first token
that any query starts at to the last cached one; the tiles between them are skipped and not counted.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

TILE_TOKENS = 64
Tables = tuple[Any, ...]  # integers in the GPU's memory


@runtime_checkable
class Tiles(Protocol):
    """The tiles of TILE_TOKENS tokens of a cache. A slab is row x K + key-value head, a tile counts within it."""

    @property
    def num_pieces(self) -> int:
        """Number of places that hold a tile, with equally many tokens each."""
        ...

    def piece(self, tables: Tables, slab: jax.Array, tile: jax.Array, number: int) -> tuple[Any, ...]:
        """The index into keys and values of one of a tile's places."""
        ...

    def position(self, tables: Tables, slab: jax.Array, tile: jax.Array) -> jax.Array:
        """The position of a tile's first token; used only if queries start at different positions."""
        ...

    def is_unmasked(self, tables: Tables, slab: jax.Array, tile: jax.Array) -> jax.Array:
        """Whether every query attends to every token of a tile."""
        ...

    def is_filled(self, tables: Tables, slab: jax.Array, tile: jax.Array, token: jax.Array) -> jax.Array:
        """Which of a tile's tokens (0 .. 63, in an array of any shape) exist and belong to no other tile."""
        ...

    def may_be_read(self, tables: Tables, slab: jax.Array, tile: jax.Array, token: jax.Array) -> jax.Array:
        """Which of them any query attends to."""
        ...


@dataclass(frozen=True)
class OrderedTiles:
    """Tiles in the order of positions.

    Tables, one entry per slab: length; skipped tiles, the lowest and the highest position that a query starts at.

    num_sink_tokens: attended to besides the window.
    is_windowed: whether the last three tables exist.
    capacity: where the last tile must end, if it must: it then starts earlier, and the tokens that it shares with the
        tile before it are masked.
    """

    num_sink_tokens: int
    is_windowed: bool
    capacity: int | None

    def _nominal(self, tables: Tables, slab: jax.Array, tile: jax.Array) -> jax.Array:
        """The position of the first token that belongs to this tile."""
        if self.is_windowed:
            num_sink_tiles = pl.cdiv(self.num_sink_tokens, TILE_TOKENS)
            tile = tile + jnp.where(tile >= num_sink_tiles, tables[1][slab], 0)
        return tile * TILE_TOKENS

    def position(self, tables: Tables, slab: jax.Array, tile: jax.Array) -> jax.Array:
        nominal = self._nominal(tables, slab, tile)
        return nominal if self.capacity is None else jnp.minimum(nominal, self.capacity - TILE_TOKENS)

    def is_unmasked(self, tables: Tables, slab: jax.Array, tile: jax.Array) -> jax.Array:
        start = self._nominal(tables, slab, tile)
        unmasked = start + TILE_TOKENS <= tables[0][slab]
        if self.is_windowed:
            unmasked = unmasked & ((start >= tables[3][slab]) | (start + TILE_TOKENS <= self.num_sink_tokens))
        return unmasked

    def is_filled(self, tables: Tables, slab: jax.Array, tile: jax.Array, token: jax.Array) -> jax.Array:
        position = self.position(tables, slab, tile)  # subtracted from scalars, cheaper than added to tokens
        filled = token < tables[0][slab] - position
        if self.capacity is not None:
            filled = filled & (token >= self._nominal(tables, slab, tile) - position)
        return filled

    def may_be_read(self, tables: Tables, slab: jax.Array, tile: jax.Array, token: jax.Array) -> jax.Array:
        filled = self.is_filled(tables, slab, tile, token)
        if not self.is_windowed:
            return filled
        position = self.position(tables, slab, tile)
        return filled & ((token >= tables[2][slab] - position) | (token < self.num_sink_tokens - position))


def ordered(
    length: jax.Array, first: jax.Array | None, num_sink_tokens: int
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """The tables of `OrderedTiles` for lengths [B, K] and first positions [B, T], and the number of tiles [B, K]."""
    num_tiles = (length + (TILE_TOKENS - 1)) // TILE_TOKENS
    if first is None:
        return (length.reshape(-1),), num_tiles
    num_sink_tiles = pl.cdiv(num_sink_tokens, TILE_TOKENS)
    starts = jnp.maximum(first, 0)
    lowest, highest = (jnp.broadcast_to(of(starts, 1)[:, None], length.shape) for of in (jnp.min, jnp.max))
    left_out = jnp.maximum(lowest // TILE_TOKENS - num_sink_tiles, 0)
    num_read = jnp.minimum(num_tiles, num_sink_tiles) + jnp.maximum(num_tiles - num_sink_tiles - left_out, 0)
    return tuple(x.reshape(-1) for x in (length, left_out, lowest, highest)), num_read
