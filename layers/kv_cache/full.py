"""The plain key-value cache: every token's keys and values, one fixed-size buffer per layer.

A layer only reads it and hands back its new rows (`KVRows`); `commit` writes the accepted ones afterwards. Rejected
tokens therefore never enter a cache, and rolling back means writing nothing (or lowering `length`, as `rewound` does).
Slot s holds position s.

Layout [B, K, S, H]: on CPU all layouts of keys and values read within 10 % of each other, and this one writes rows
whole.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from decodax.layers import pytree
from decodax.layers.kv_cache.write import write_tokens


@pytree.dataclass
class KVRows:
    """Keys and values of the tokens of one forward, not yet in any cache.

    `kept[b, t]` false marks a token for which this layer did not run: its row is garbage that no later query reads.
    """

    key: Float[Array, "B K T H"]
    value: Float[Array, "B K T H"]
    kept: Bool[Array, "B T"] | None = None

    @classmethod
    def empty(cls, batch_size: int, num_kv_heads: int, num_tokens: int, head_size: int, dtype: DTypeLike) -> "KVRows":
        """Room for tokens that are to be staged (see staged.py)."""
        shape = (batch_size, num_kv_heads, num_tokens, head_size)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def place(self, new: "KVRows", slot: Int[Array, " T"]) -> "KVRows":
        """These rows with `new` ones at the given slots; a slot beyond them is dropped.

        Raises ValueError for rows that mark tokens as not kept: attention reads every staged row that the mask allows.
        """
        if new.kept is not None:
            raise ValueError("rows marked by `kept` cannot be staged: stage only layers that ran for every token")

        def write(rows: Array, fresh: Array) -> Array:
            return rows.at[:, :, slot].set(fresh.astype(rows.dtype), mode="drop")

        return dataclasses.replace(self, key=write(self.key, new.key), value=write(self.value, new.value))


@pytree.dataclass
class KVCache:
    """Filled slots are 0 .. length - 1; with `kept`, those of them that are marked, per key-value head."""

    key: Float[Array, "B K S H"]
    value: Float[Array, "B K S H"]
    length: Int[Array, " B"]
    kept: Bool[Array, "B K S"] | None = None

    @classmethod
    def empty(
        cls,
        batch_size: int,
        num_kv_heads: int,
        capacity: int,
        head_size: int,
        dtype: DTypeLike,
        *,
        track_kept: bool = False,
    ) -> "KVCache":
        """A cache for `capacity` tokens per row; `track_kept` if some tokens will skip this layer or be evicted."""
        shape = (batch_size, num_kv_heads, capacity, head_size)
        kept = jnp.zeros(shape[:3], bool) if track_kept else None
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch_size, jnp.int32), kept)

    @property
    def capacity(self) -> int:
        return self.key.shape[2]

    @property
    def marks_tokens(self) -> bool:
        return self.kept is not None

    def rewound(self, length: Int[Array, " B"]) -> "KVCache":
        """The cache without the tokens behind the first `length[b]` of a row."""
        return dataclasses.replace(self, length=jnp.minimum(self.length, length))

    def part(self, first: Int[Array, ""]) -> "KVCache":
        """What a device sees that has the slots from `first` on, `capacity` of them (see `Splittable`)."""
        return dataclasses.replace(self, length=jnp.clip(self.length - first, 0, self.capacity))

    def read(
        self, start: Int[Array, ""], num_tokens: int
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"], Int[Array, "#B S"], Bool[Array, "B #K S"]]:
        """Keys, values, positions and validity of `num_tokens` consecutive slots; `start` must leave room for them."""
        key, value = (jax.lax.dynamic_slice_in_dim(x, start, num_tokens, axis=2) for x in (self.key, self.value))
        slot = start + jnp.arange(num_tokens, dtype=jnp.int32)
        filled = (slot[None, :] < self.length[:, None])[:, None, :]
        if self.kept is not None:
            filled = filled & jax.lax.dynamic_slice_in_dim(self.kept, start, num_tokens, axis=2)
        return key, value, slot[None, :], filled

    def commit(self, rows: KVRows, count: Int[Array, " B"], path: Int[Array, "B A"] | None = None) -> "KVCache":
        """Appends `count[b]` of a row's tokens: the first ones, or those listed in `path[b]` (node indices of a tree).

        The caller makes sure that they fit; what does not is dropped. To let XLA write in place inside a loop, `count`
        has to depend on what the reads of this cache led to, as the outcome of a verification does.
        """
        key, value, kept = rows.key, rows.value, rows.kept
        if path is not None:
            key, value = (jnp.take_along_axis(x, path[:, None, :, None], axis=2) for x in (key, value))
            kept = None if kept is None else jnp.take_along_axis(kept, path, axis=1)
        offset = jnp.arange(key.shape[2], dtype=jnp.int32)[None, :]
        slot = jnp.where(offset < count[:, None], self.length[:, None] + offset, self.capacity)

        new_kept = self.kept
        if self.kept is not None:
            fresh = jnp.ones(slot.shape, bool) if kept is None else kept
            marks = jnp.broadcast_to(fresh[:, None, :], (*self.kept.shape[:2], slot.shape[1]))
            new_kept = write_tokens(self.kept, marks, slot, axis=2)
        elif kept is not None:
            raise ValueError("rows with `kept` need a cache made with track_kept=True, got one without")
        key, value = (write_tokens(old, new, slot, axis=2) for old, new in ((self.key, key), (self.value, value)))
        return dataclasses.replace(self, key=key, value=value, length=self.length + count, kept=new_kept)


class MarkedCache:
    """The policy of caches that mark which tokens each layer has run for, as methods need that leave out layers."""

    @staticmethod
    def empty(batch_size: int, num_kv_heads: int, capacity: int, head_size: int, dtype: DTypeLike) -> KVCache:
        return KVCache.empty(batch_size, num_kv_heads, capacity, head_size, dtype, track_kept=True)
