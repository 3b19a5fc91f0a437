"""Some of the rows of a batch, and what a cache holds of them, read where it lies.

Pipeline stages work on a few rows at a time (`models/pipelined.py`). Cutting those out of a cache would copy them at
every tick; a `Part` cuts what is read of them, block by block, which costs nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decodax.layers import pytree
from decodax.layers.kv_cache._contract import Cache
from decodax.layers.kv_cache.latent import LatentCache
from decodax.layers.kv_cache.staged import Staged
from decodax.layers.kv_cache.tailed import TailedCache


@pytree.dataclass
class MicroBatch:
    """Number `index` of `count` equal parts of the rows; each takes the same share of every one of `groups` runs.

    With as many groups as devices over which rows are split, each device finds its part among its own rows.

    >>> rows = MicroBatch(jnp.int32(1), count=2, groups=2)
    >>> rows.cut(jnp.arange(8)).tolist()
    [2, 3, 6, 7]
    """

    index: Int[Array, ""]
    count: int = pytree.static()
    groups: int = pytree.static()

    def cut(self, array: Array) -> Array:
        """These rows of an array [B, ...]."""
        part = jax.lax.dynamic_index_in_dim(self._grouped(array, 0), self.index, 1, keepdims=False)
        return part.reshape(-1, *array.shape[1:])

    def put(self, array: Array, new: Array, is_wanted: Bool[Array, ""]) -> Array:
        """The array [B, ...] with these rows replaced; as it was, if they are not wanted."""
        return self.put_at(jnp.int32(0), array[None], new, is_wanted)[0]

    def put_at(self, layer: Int[Array, ""], arrays: Array, new: Array, is_wanted: Bool[Array, ""]) -> Array:
        """As `put`, in one of several arrays [layers, B, ...]."""
        grouped = self._grouped(arrays, 1)
        start = (layer, 0, self.index, *(0,) * (grouped.ndim - 3))
        held = jax.lax.dynamic_slice(grouped, start, (1, self.groups, 1, *grouped.shape[3:]))
        new = jnp.where(is_wanted, new.reshape(held.shape), held)
        return jax.lax.dynamic_update_slice(grouped, new, start).reshape(arrays.shape)

    def _grouped(self, array: Array, axis: int) -> Array:
        return array.reshape(*array.shape[:axis], self.groups, self.count, -1, *array.shape[axis + 1 :])


@pytree.dataclass
class Part:
    """A cache of which only some rows are read: all that attention in plain JAX asks of a cache, and never written."""

    cache: Any
    rows: MicroBatch

    @property
    def length(self) -> Int[Array, " B"]:
        return self.rows.cut(self.cache.length)

    @property
    def capacity(self) -> int:
        return self.cache.capacity

    def read(
        self, start: Int[Array, ""], num_tokens: int
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"], Int[Array, "#B S"], Bool[Array, "B #K S"]]:
        """As `Cache.read`; positions may be the same for all rows."""
        return tuple(map(self._rows_of, self.cache.read(start, num_tokens)))

    def read_latents(
        self, start: Int[Array, ""], num_tokens: int
    ) -> tuple[Float[Array, "B S R"], Float[Array, "B S H"], Int[Array, "1 S"], Bool[Array, "B S"]]:
        """As `LatentCache.read_latents`."""
        return tuple(map(self._rows_of, self.cache.read_latents(start, num_tokens)))

    def commit(self, rows: Any, count: Int[Array, " B"], path: Int[Array, "B A"] | None = None) -> "Part":
        raise TypeError("a part of a cache is only read: commit to the cache of all rows")

    def _rows_of(self, array: Array) -> Array:
        return array if array.shape[0] == 1 < self.cache.length.shape[0] else self.rows.cut(array)


def part_of(cache: Any, rows: MicroBatch, *, in_place: bool) -> Any:
    """What a layer is to read of its cache (or `Staged`) for some of the rows.

    in_place: read keys, values and latents where they lie; else, as kernels need it, they are cut out. Recurrent states
    are cut out always: a layer reads all of a state, and once.
    """
    if isinstance(cache, Staged):
        return Staged(part_of(cache.cache, rows, in_place=in_place), _cut(cache.rows, rows), rows.cut(cache.position))
    if isinstance(cache, TailedCache):
        return TailedCache(part_of(cache.kv, rows, in_place=in_place), rows.cut(cache.tail))
    reads_slots = isinstance(cache, LatentCache | Cache)
    return Part(cache, rows) if reads_slots and in_place else _cut(cache, rows)


def _cut(tree: Any, rows: MicroBatch) -> Any:
    return jax.tree.map(rows.cut, tree)
