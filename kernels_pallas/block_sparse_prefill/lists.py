"""Defines `BlockLists`, the key blocks that each query block attends to, as concatenated lists with start offsets.

A prompt is cut into blocks of queries, the cache into blocks of keys. This is the compressed sparse row (CSR) form of
the block mask [query blocks, key blocks] of a head: its size is that of the blocks attended to, not the prompt squared.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from decodax.core import pytree


@pytree.dataclass
class BlockLists:
    """Query block i of a head attends to the key blocks `index[start[i]]` .. `index[start[i + 1] - 1]`.

    There is one set of lists per query head, or one for each group of consecutive query heads that share a key-value
    head: `lists` is a multiple of K that divides N. The entries of `index` after the last list are never read.

    A block must not be twice in one list: its keys would count twice. Any order is correct; ascending order is
    cheapest, as masked blocks at the end of a list (too late, or after the row's length) are then dropped before
    anything is loaded.

    >>> lists = BlockLists.from_mask(jnp.array([[[[True, False], [True, True]]]]), query_block=64, key_block=64)
    >>> lists.start.tolist(), lists.index.tolist()
    ([[[0, 1, 3]]], [[[0, 0, 1]]])
    """

    start: Int[Array, "B lists starts"]  # one more than there are query blocks
    index: Int[Array, "B lists entries"]
    query_block: int = pytree.static()  # queries per block
    key_block: int = pytree.static()  # keys per block

    @classmethod
    def from_mask(
        cls,
        reads: Bool[Array, "B lists query_blocks key_blocks"],
        *,
        query_block: int,
        key_block: int,
        capacity: int | None = None,
    ) -> "BlockLists":
        """The lists of the blocks that are true.

        reads: the block mask.
        query_block, key_block: tokens per block.
        capacity: room for entries per set of lists; by default just enough, which needs a mask with known values. Of a
            traced mask, which cannot be checked, entries that do not fit are dropped (those of the last query blocks).
        Raises ValueError for a traced mask without a capacity, and for a capacity that is too small.
        """
        batch, lists, _, key_blocks = reads.shape
        ends = jnp.cumsum(jnp.sum(reads, axis=3, dtype=jnp.int32), axis=2)
        if isinstance(reads, Tracer):
            if capacity is None:
                raise ValueError("the number of listed blocks of a traced mask is not known: give a capacity")
        else:
            needed = int(np.max(np.asarray(ends), initial=0))
            capacity = max(needed, 1) if capacity is None else capacity
            if needed > capacity:
                raise ValueError(f"capacity must be at least {needed} (the most blocks of any head), got {capacity}")
        flat = reads.reshape(batch, lists, -1)
        place = jnp.where(flat, jnp.cumsum(flat, axis=2, dtype=jnp.int32) - 1, capacity)
        block = jnp.broadcast_to(jnp.arange(flat.shape[2], dtype=jnp.int32) % key_blocks, flat.shape)
        row, head = jnp.arange(batch)[:, None, None], jnp.arange(lists)[None, :, None]
        index = jnp.zeros((batch, lists, capacity), jnp.int32).at[row, head, place].set(block, mode="drop")
        start = jnp.minimum(jnp.pad(ends, ((0, 0), (0, 0), (1, 0))), capacity)
        return cls(start, index, query_block, key_block)

    @property
    def num_query_blocks(self) -> int:
        return self.start.shape[2] - 1

    def within(self, num_key_blocks: int) -> "BlockLists":
        """The same lists as int32, safe to follow: entries outside the keys become the block after the last one.

        Raises ValueError for lists that are not in order, point outside the keys or name a block twice, if their values
        are known.
        """
        if not isinstance(self.start, Tracer) and not isinstance(self.index, Tracer):
            self._check(num_key_blocks)
        start = jnp.clip(self.start.astype(jnp.int32), 0, self.index.shape[2])
        index = self.index.astype(jnp.int32)
        index = jnp.where((index >= 0) & (index < num_key_blocks), index, num_key_blocks)
        return dataclasses.replace(self, start=start, index=index)

    def _check(self, num_key_blocks: int) -> None:
        start, index = np.asarray(self.start, np.int64), np.asarray(self.index, np.int64)
        entries = index.shape[2]
        if np.any(start[..., 0] != 0) or np.any(np.diff(start, axis=2) < 0) or np.any(start[..., -1] > entries):
            raise ValueError(f"starts of block lists must rise from 0 to at most the {entries} entries, got {start}")
        listed = np.arange(entries) < start[..., -1:]
        outside = index[listed & ((index < 0) | (index >= num_key_blocks))]
        if outside.size:
            raise ValueError(f"block lists must name key blocks in 0..{num_key_blocks - 1}, got {outside[0]}")
        which = np.repeat(
            np.arange(start[..., 1:].size), np.diff(start, axis=2).ravel()
        )  # list that an entry belongs to
        names, count = np.unique(which * num_key_blocks + index[listed], return_counts=True)
        if np.any(count > 1):
            which, block = divmod(int(names[np.argmax(count)]), num_key_blocks)
            row, head, query_block = np.unravel_index(which, start[..., 1:].shape)
            place = f"row {row}, set of lists {head}, query block {query_block}"
            raise ValueError(f"a list must not name a block twice, got key block {block} twice in {place}")
