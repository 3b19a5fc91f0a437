"""Some of the rows of a batch, and what a cache holds of them, read where it lies.

Pipeline stages work on a few rows at a time, and on one chunk of their layers (`models/pipelined.py`). Cutting those
out of the caches would copy them at every tick. A `CachePart` cuts what is read of them, block by block, at no cost.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decodax.layers import pytree
from decodax.layers.kv_cache._contract import Cache
from decodax.layers.kv_cache.latent import LatentCache
from decodax.layers.kv_cache.stacked import first_of, lengths_of
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
        return self.cut_at(jnp.int32(0), array[None])

    def cut_at(self, layer: Int[Array, ""], arrays: Array) -> Array:
        """As `cut`, of one of several arrays [layers, B, ...]; in one step, so that no more than that is read."""
        if self.count == 1:
            return at(layer, arrays)
        grouped = self._grouped(arrays)
        start = (layer, 0, self.index, *(0,) * (grouped.ndim - 3))
        part = jax.lax.dynamic_slice(grouped, start, (1, self.groups, 1, *grouped.shape[3:]))
        return part.reshape(-1, *arrays.shape[2:])

    def put(self, array: Array, new: Array, is_wanted: Bool[Array, ""]) -> Array:
        """The array [B, ...] with these rows replaced; as it was, if they are not wanted."""
        return self.put_at(jnp.int32(0), array[None], new, is_wanted)[0]

    def put_at(self, layer: Int[Array, ""], arrays: Array, new: Array, is_wanted: Bool[Array, ""]) -> Array:
        """As `put`, in one of several arrays [layers, B, ...]."""
        grouped = self._grouped(arrays)
        start = (layer, 0, self.index, *(0,) * (grouped.ndim - 3))
        held = jax.lax.dynamic_slice(grouped, start, (1, self.groups, 1, *grouped.shape[3:]))
        new = jnp.where(is_wanted, new.reshape(held.shape), held)
        return jax.lax.dynamic_update_slice(grouped, new, start).reshape(arrays.shape)

    def _grouped(self, arrays: Array) -> Array:
        return arrays.reshape(arrays.shape[0], self.groups, self.count, -1, *arrays.shape[2:])


@pytree.dataclass
class CachePart:
    """Some rows of one cache of a stack: all that attention in plain JAX asks of a cache, and never written."""

    stack: Any
    layer: Int[Array, ""]
    rows: MicroBatch

    @property
    def length(self) -> Int[Array, " B"]:
        return self.rows.cut_at(self.layer, lengths_of(self.stack))

    @property
    def capacity(self) -> int:
        return first_of(self.stack).capacity

    def read(
        self, start: Int[Array, ""], num_tokens: int
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"], Int[Array, "#B S"], Bool[Array, "B #K S"]]:
        """As `Cache.read`."""
        return self._part_of(jax.vmap(lambda cache: cache.read(start, num_tokens))(self.stack))

    def read_latents(
        self, start: Int[Array, ""], num_tokens: int
    ) -> tuple[Float[Array, "B S R"], Float[Array, "B S H"], Int[Array, "1 S"], Bool[Array, "B S"]]:
        """As `LatentCache.read_latents`."""
        return self._part_of(jax.vmap(lambda cache: cache.read_latents(start, num_tokens))(self.stack))

    def commit(self, rows: Any, count: Int[Array, " B"], path: Int[Array, "B A"] | None = None) -> "CachePart":
        raise TypeError("a part of a cache is only read: commit to the cache of all rows")

    def _part_of(self, slots: tuple[Array, ...]) -> Any:
        """What was read of all rows of all layers, cut down to these; positions may be the same for all rows."""
        batch = lengths_of(self.stack).shape[1]
        is_per_row = [array.shape[1] == batch for array in slots]
        cuts = (self.rows.cut_at if per_row else at for per_row in is_per_row)
        return tuple(cut_at(self.layer, array) for cut_at, array in zip(cuts, slots, strict=True))


def part_of(stack: Any, layer: Int[Array, ""], rows: MicroBatch, *, in_place: bool) -> Any:
    """What a layer is to read for some of the rows, out of the stack of caches (or of what is staged) that its is in.

    in_place: read keys, values and latents where they lie; else, as kernels need it, they are cut out. Recurrent states
    are cut out always: a layer reads all of a state, and once. Nothing is, if the stack is one cache and the part all.
    """
    if isinstance(stack, TailedCache):
        tail = cut(stack.tail, layer, rows)
        return dataclasses.replace(stack, kv=part_of(stack.kv, layer, rows, in_place=in_place), tail=tail)
    is_all = rows.count == 1 and jax.tree.leaves(stack)[0].shape[0] == 1
    reads_slots = isinstance(stack, LatentCache | Cache)
    return CachePart(stack, layer, rows) if reads_slots and in_place and not is_all else cut(stack, layer, rows)


def cut(tree: Any, layer: Int[Array, ""], rows: MicroBatch) -> Any:
    """Some rows of one layer, of arrays [layers, B, ...]."""
    return jax.tree.map(lambda stack: rows.cut_at(layer, stack), tree)


def at(layer: Int[Array, ""], stack: Array) -> Array:
    """One of the arrays of a stack [layers, ...]."""
    return stack[0] if stack.shape[0] == 1 else jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)
