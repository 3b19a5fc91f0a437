"""Reads one layer's cache for the rows of one micro-batch, without copying them out of a pipeline stage's stack.

Pipeline stages work on a few rows at a time, and on one chunk of their layers (`models/pipelined.py`). Slicing those
out of the caches would copy them at every tick. A `MicroBatchCache` slices each block as it is read, at no cost.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decodax.core import pytree
from decodax.layers.kv_cache.contract import ReadableCache
from decodax.layers.kv_cache.stacked import first_of, lengths_of
from decodax.layers.kv_cache.tailed import TailedCache


@pytree.dataclass
class MicroBatch:
    """The rows of one micro-batch: the same share of each of `groups` groups of consecutive rows.

    With as many groups as devices over which rows are split, each device has its share among its own rows.

    index: of the micro-batch.
    count: of equal micro-batches.
    groups: of consecutive rows.

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
        """As `cut`, of one of several arrays [layers, B, ...]; in one slice, so that nothing else is read."""
        if self.count == 1:
            return at(layer, arrays)
        grouped = self._grouped(arrays)
        start = (layer, 0, self.index, *(0,) * (grouped.ndim - 3))
        held = jax.lax.dynamic_slice(grouped, start, (1, self.groups, 1, *grouped.shape[3:]))
        return held.reshape(held.shape[1] * held.shape[3], *arrays.shape[2:])

    def put(self, array: Array, new: Array, is_active: Bool[Array, ""]) -> Array:
        """The array [B, ...] with these rows replaced; unchanged unless `is_active`."""
        return self.put_at(jnp.int32(0), array[None], new, is_active)[0]

    def put_at(self, layer: Int[Array, ""], arrays: Array, new: Array, is_active: Bool[Array, ""]) -> Array:
        """As `put`, in one of several arrays [layers, B, ...].

        layer: index of the array.
        arrays: of all layers.
        new: rows of this micro-batch.
        is_active: whether they are written.
        """
        grouped = self._grouped(arrays)
        start = (layer, 0, self.index, *(0,) * (grouped.ndim - 3))
        held = jax.lax.dynamic_slice(grouped, start, (1, self.groups, 1, *grouped.shape[3:]))
        new = jnp.where(is_active, new.reshape(held.shape), held)
        return jax.lax.dynamic_update_slice(grouped, new, start).reshape(arrays.shape)

    def _grouped(self, arrays: Array) -> Array:
        rows = arrays.shape[1] // (self.groups * self.count)  # not -1, which an array without numbers does not tell
        return arrays.reshape(arrays.shape[0], self.groups, self.count, rows, *arrays.shape[2:])


@pytree.dataclass
class MicroBatchCache:
    """The cache of one layer for the rows of one micro-batch: read-only, as attention in plain JAX uses a cache.

    stack: caches of several layers.
    layer: index in the stack.
    rows: of the micro-batch.
    """

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
        """As `ReadableCache.read`."""
        return self._cut(jax.vmap(lambda cache: cache.read(start, num_tokens))(self.stack))

    def read_latents(
        self, start: Int[Array, ""], num_tokens: int
    ) -> tuple[Float[Array, "B S R"], Float[Array, "B S H"], Int[Array, "1 S"], Bool[Array, "B S"]]:
        """As `LatentCache.read_latents`."""
        return self._cut(jax.vmap(lambda cache: cache.read_latents(start, num_tokens))(self.stack))

    def _cut(self, slots: tuple[Array, ...]) -> Any:
        """These rows of what was read of all rows of all layers; positions may be the same for all rows."""
        batch = lengths_of(self.stack).shape[1]
        is_per_row = [array.shape[1] == batch for array in slots]
        cuts = (self.rows.cut_at if per_row else at for per_row in is_per_row)
        return tuple(cut_at(self.layer, array) for cut_at, array in zip(cuts, slots, strict=True))


def micro_batch_cache(stack: Any, layer: Int[Array, ""], rows: MicroBatch, *, in_place: bool) -> Any:
    """The cache that a layer reads for the rows of a micro-batch.

    Recurrent states are always sliced out: a layer reads all of a state, and once.

    stack: of caches (or of staged updates) of several layers.
    layer: index in the stack.
    rows: of the micro-batch.
    in_place: keys, values and latents are not sliced out, as kernels need it, but read in place. A stack of one cache
        with all rows is never copied.
    """
    if isinstance(stack, TailedCache):
        tail = cut(stack.tail, layer, rows)
        return dataclasses.replace(stack, kv=micro_batch_cache(stack.kv, layer, rows, in_place=in_place), tail=tail)
    is_all = rows.count == 1 and jax.tree.leaves(stack)[0].shape[0] == 1
    reads_slots = isinstance(stack, ReadableCache)
    return MicroBatchCache(stack, layer, rows) if reads_slots and in_place and not is_all else cut(stack, layer, rows)


def cut(tree: Any, layer: Int[Array, ""], rows: MicroBatch) -> Any:
    """The rows of a micro-batch in one layer, of arrays [layers, B, ...]."""
    return jax.tree.map(lambda stack: rows.cut_at(layer, stack), tree)


def at(layer: Int[Array, ""], stack: Array) -> Array:
    """One of the arrays of a stack [layers, ...]."""
    return stack[0] if stack.shape[0] == 1 else jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)
