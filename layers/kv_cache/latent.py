"""Implements the cache of latent attention: per token one latent and one rope key, which all heads share.

DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model (arXiv 2405.04434), section 2.1. A
token takes R + H numbers per layer for any number of heads: 576 in DeepSeek-V3, where keys and values of its 128 heads
would take 40,960.

Attention in plain JAX uses it as a cache with one key-value head: the key is the latent followed by the rope key, and
so is the value, of which the last H numbers are not used.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from decodax.core import pytree
from decodax.layers.kv_cache.contract import Slots
from decodax.layers.kv_cache.write import invalid_without_room, slots_after, write_tokens


@pytree.dataclass
class LatentUpdate:
    """The cache update of the tokens of one forward, not yet in any cache.

    latent: normed.
    rope_key: rotated.
    kept: kept[b, t] is false for a token for which this layer did not run: its entry is garbage that no query attends
        to.
    """

    latent: Float[Array, "B T R"]
    rope_key: Float[Array, "B T H"]
    kept: Bool[Array, "B T"] | None = None

    @classmethod
    def empty(cls, batch_size: int, num_tokens: int, rank: int, rope_size: int, dtype: DTypeLike) -> "LatentUpdate":
        """An empty update for tokens that will be staged (see staged.py); sizes are those of its arrays."""
        shape = (batch_size, num_tokens)
        return cls(jnp.zeros((*shape, rank), dtype), jnp.zeros((*shape, rope_size), dtype))

    def place(self, new: "LatentUpdate", slot: Int[Array, " T"]) -> "LatentUpdate":
        """This update with `new` tokens at the given slots; a slot beyond the last is dropped.

        Raises ValueError for an update that marks tokens as not kept: attention attends to every staged token that the
            mask allows.
        """
        if new.kept is not None:
            raise ValueError("tokens marked by `kept` cannot be staged: stage only layers that ran for every token")

        def write(update: Array, fresh: Array) -> Array:
            return update.at[:, slot].set(fresh.astype(update.dtype), mode="drop")

        latent, rope_key = write(self.latent, new.latent), write(self.rope_key, new.rope_key)
        return dataclasses.replace(self, latent=latent, rope_key=rope_key)

    def after(self, staged: "LatentUpdate") -> "LatentUpdate":
        """One update of the staged tokens followed by these."""
        pairs = ((staged.latent, self.latent), (staged.rope_key, self.rope_key))
        return LatentUpdate(*(jnp.concatenate([old.astype(new.dtype), new], axis=1) for old, new in pairs))


@pytree.dataclass
class LatentCache:
    """A latent cache; slot s holds position s.

    latent, rope_key: of all slots.
    length: slots 0 .. length - 1 are filled.
    kept: which of them hold a token; None for all.
    """

    latent: Float[Array, "B S R"]
    rope_key: Float[Array, "B S H"]
    length: Int[Array, " B"]
    kept: Bool[Array, "B S"] | None = None

    @classmethod
    def empty(
        cls, batch_size: int, capacity: int, rank: int, rope_size: int, dtype: DTypeLike, *, track_kept: bool = False
    ) -> "LatentCache":
        """An empty cache.

        batch_size, rank, rope_size: of its arrays.
        capacity: tokens of each row.
        dtype: of latents and rope keys.
        track_kept: whether some tokens will skip this layer or be evicted.
        """
        shape = (batch_size, capacity)
        kept = jnp.zeros(shape, bool) if track_kept else None
        latent, rope_key = (jnp.zeros((*shape, size), dtype) for size in (rank, rope_size))
        return cls(latent, rope_key, jnp.zeros(batch_size, jnp.int32), kept)

    @property
    def capacity(self) -> int:
        return self.latent.shape[1]

    @property
    def marks_tokens(self) -> bool:
        return self.kept is not None

    @property
    def latent_slots(self) -> Slots | None:
        """What kernels read (see `HasSlots`)."""
        return Slots(self.latent, self.rope_key, self.length) if self.kept is None else None

    def empty_like(self) -> "LatentCache":
        """An empty cache of the same form."""
        return jax.tree.map(jnp.zeros_like, self)

    def rewound(self, length: Int[Array, " B"]) -> "LatentCache":
        """The cache without the tokens after the first `length[b]` of a row."""
        return dataclasses.replace(self, length=jnp.minimum(self.length, length))

    def shard(self, first: Int[Array, ""]) -> "LatentCache":
        """The shard of a device with the `capacity` slots from `first` on (see `Splittable`)."""
        return dataclasses.replace(self, length=jnp.clip(self.length - first, 0, self.capacity))

    def read_latents(
        self, start: Int[Array, ""], num_tokens: int
    ) -> tuple[Float[Array, "B S R"], Float[Array, "B S H"], Int[Array, "1 S"], Bool[Array, "B S"]]:
        """Latents, rope keys, positions and validity of the `num_tokens` slots from `start` on, within `capacity`."""

        def cut(buffer: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(buffer, start, num_tokens, axis=1)

        slot = start + jnp.arange(num_tokens, dtype=jnp.int32)
        filled = slot[None, :] < self.length[:, None]
        if self.kept is not None:
            filled = filled & cut(self.kept)
        return cut(self.latent), cut(self.rope_key), slot[None, :], filled

    def read(
        self, start: Int[Array, ""], num_tokens: int
    ) -> tuple[Float[Array, "B 1 S I"], Float[Array, "B 1 S I"], Int[Array, "1 S"], Bool[Array, "B 1 S"]]:
        """As `ReadableCache.read`: one head, whose keys and values are latents followed by rope keys, I = R + H."""
        latent, rope_key, position, filled = self.read_latents(start, num_tokens)
        tokens = jnp.concatenate([latent, rope_key], axis=2)[:, None]
        return tokens, tokens, position, filled[:, None]

    def commit(
        self, update: LatentUpdate, count: Int[Array, " B"], path: Int[Array, "B A"] | None = None
    ) -> "LatentCache":
        """Appends `count[b]` of a row's tokens: the first ones, or those in `path[b]` (node indices of a tree).

        A row without room for them fails (`invalid_without_room`). For XLA to write in place inside a loop, `count`
        must depend on the reads of this cache, as the outcome of a verification does.
        """
        latent, rope_key, kept = update.latent, update.rope_key, update.kept
        if path is not None:
            latent, rope_key = (jnp.take_along_axis(new, path[:, :, None], axis=1) for new in (latent, rope_key))
            kept = None if kept is None else jnp.take_along_axis(kept, path, axis=1)
        if self.kept is None and kept is not None:
            raise ValueError("an update with `kept` needs a cache made with track_kept=True, got one without")
        slot = slots_after(self.length, count, latent.shape[1], self.capacity)
        latent = invalid_without_room(latent, self.length + count > self.capacity)
        new_kept = self.kept
        if new_kept is not None:
            new_kept = write_tokens(new_kept, jnp.ones(slot.shape, bool) if kept is None else kept, slot, axis=1)
        return dataclasses.replace(
            self,
            latent=write_tokens(self.latent, latent, slot, axis=1),
            rope_key=write_tokens(self.rope_key, rope_key, slot, axis=1),
            length=self.length + count,
            kept=new_kept,
        )
