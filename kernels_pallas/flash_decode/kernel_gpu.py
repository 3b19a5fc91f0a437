"""Runs `flash_decode` on Hopper GPUs: locates a contiguous cache's tiles for the kernels of `decode/kernel_gpu.py`."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.compat import aligned_rows
from decodax.kernels_pallas.decode.kernel_gpu import decode, unsupported_sizes
from decodax.kernels_pallas.decode.new_tokens import NewTokens
from decodax.kernels_pallas.decode.tiles_gpu import TILE_TOKENS, OrderedTiles, Tables, ordered
from decodax.kernels_pallas.selection import every_reason


class _CacheTiles(OrderedTiles):
    """Tiles of a cache [slabs, S, H]."""

    num_pieces = 1

    def piece(self, tables: Tables, slab: jax.Array, tile: jax.Array, number: int) -> tuple[Any, ...]:
        return slab, aligned_rows(self.position(tables, slab, tile), TILE_TOKENS)


@every_reason
def unsupported_reason(
    query: Any, key: Any, value: Any, new: NewTokens | None, *, interpret: bool
) -> Iterator[str | None]:
    """Every reason why the kernel does not support these operands."""
    if key.shape[2] < TILE_TOKENS or key.shape[2] % 8:
        yield f"the cache's slots (S) must be at least {TILE_TOKENS} and a multiple of 8, there are {key.shape[2]}"
    yield unsupported_sizes(query, key, value, new, interpret=interpret)


def flash_decode(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S I"],
    length: Int[Array, " B"],
    new: NewTokens | None,
    *,
    scale: float,
    softcap: float | None,
    first: Int[Array, "B T"] | None,
    num_sink_tokens: int,
    sink_logits: Float[Array, " N"] | None,
    interpret: bool,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B T N"]]:
    """See `decodax.kernels_pallas.flash_decode.flash_decode`."""
    batch, num_kv_heads, capacity, _ = key.shape
    tables, num_tiles = ordered(jnp.broadcast_to(length[:, None], (batch, num_kv_heads)), first, num_sink_tokens)
    return decode(
        query,
        key.reshape(batch * num_kv_heads, capacity, -1),
        value.reshape(batch * num_kv_heads, capacity, -1),
        tables,
        num_tiles,
        new,
        tiles=_CacheTiles(num_sink_tokens, first is not None, None if capacity % TILE_TOKENS == 0 else capacity),
        name="flash_decode",
        scale=scale,
        softcap=softcap,
        first=first,
        num_sink_tokens=num_sink_tokens,
        sink_logits=sink_logits,
        interpret=interpret,
    )
