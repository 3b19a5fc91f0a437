"""The cache of latent attention: per token one latent and one rope key that all heads share, and no keys or values.

DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model (arXiv 2405.04434), section 2.1. A
token takes R + H numbers per layer whatever the number of heads: 576 in DeepSeek-V3, where keys and values of its 128
heads would take 40,960.

To attention in plain JAX it is a cache with one key-value head: the key is the latent with the rope key behind it, and
so is the value, of which the last H numbers are not used.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from decodax.layers import pytree
from decodax.layers.kv_cache.write import write_tokens


@pytree.dataclass
class LatentRows:
    """Latents (normed) and rope keys (rotated) of the tokens of one forward, not yet in any cache.

    `kept[b, t]` false marks a token for which this layer did not run: its row is garbage that no later query reads.
    """

    latent: Float[Array, "B T R"]
    rope_key: Float[Array, "B T H"]
    kept: Bool[Array, "B T"] | None = None

    @classmethod
    def empty(cls, batch_size: int, num_tokens: int, rank: int, rope_size: int, dtype: DTypeLike) -> "LatentRows":
        """Room for tokens that are to be staged (see staged.py)."""
        shape = (batch_size, num_tokens)
        return cls(jnp.zeros((*shape, rank), dtype), jnp.zeros((*shape, rope_size), dtype))

    def place(self, new: "LatentRows", slot: Int[Array, " T"]) -> "LatentRows":
        """These rows with `new` ones at the given slots; a slot beyond them is dropped.

        Raises ValueError for rows that mark tokens as not kept: attention reads every staged row that the mask allows.
        """
        if new.kept is not None:
            raise ValueError("rows marked by `kept` cannot be staged: stage only layers that ran for every token")

        def write(rows: Array, fresh: Array) -> Array:
            return rows.at[:, slot].set(fresh.astype(rows.dtype), mode="drop")

        latent, rope_key = write(self.latent, new.latent), write(self.rope_key, new.rope_key)
        return dataclasses.replace(self, latent=latent, rope_key=rope_key)

    def behind(self, staged: "LatentRows") -> "LatentRows":
        """These rows with the staged ones in front of them."""
        pairs = ((staged.latent, self.latent), (staged.rope_key, self.rope_key))
        return LatentRows(*(jnp.concatenate([old.astype(new.dtype), new], axis=1) for old, new in pairs))


@pytree.dataclass
class LatentCache:
    """Filled slots are 0 .. length - 1, slot s holding position s; with `kept`, those of them that are marked."""

    latent: Float[Array, "B S R"]
    rope_key: Float[Array, "B S H"]
    length: Int[Array, " B"]
    kept: Bool[Array, "B S"] | None = None

    @classmethod
    def empty(
        cls, batch_size: int, capacity: int, rank: int, rope_size: int, dtype: DTypeLike, *, track_kept: bool = False
    ) -> "LatentCache":
        """A cache for `capacity` tokens per row; `track_kept` if some tokens will skip this layer or be evicted."""
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

    def rewound(self, length: Int[Array, " B"]) -> "LatentCache":
        """The cache without the tokens behind the first `length[b]` of a row."""
        return dataclasses.replace(self, length=jnp.minimum(self.length, length))

    def part(self, first: Int[Array, ""]) -> "LatentCache":
        """What a device sees that has the slots from `first` on, `capacity` of them (see `Splittable`)."""
        return dataclasses.replace(self, length=jnp.clip(self.length - first, 0, self.capacity))

    def read_latents(
        self, start: Int[Array, ""], num_tokens: int
    ) -> tuple[Float[Array, "B S R"], Float[Array, "B S H"], Int[Array, "1 S"], Bool[Array, "B S"]]:
        """Latents, rope keys, positions and validity of consecutive slots; `start` leaves room for `num_tokens`."""

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
        """As any cache gives its slots: one head, whose keys and values are latents and rope keys, I = R + H."""
        latent, rope_key, position, filled = self.read_latents(start, num_tokens)
        tokens = jnp.concatenate([latent, rope_key], axis=2)[:, None]
        return tokens, tokens, position, filled[:, None]

    def commit(self, rows: LatentRows, count: Int[Array, " B"], path: Int[Array, "B A"] | None = None) -> "LatentCache":
        """Appends `count[b]` of a row's tokens: the first ones, or those listed in `path[b]` (node indices of a tree).

        The caller makes sure that they fit; what does not is dropped. To let XLA write in place inside a loop, `count`
        has to depend on what the reads of this cache led to, as the outcome of a verification does.
        """
        latent, rope_key, kept = rows.latent, rows.rope_key, rows.kept
        if path is not None:
            latent, rope_key = (jnp.take_along_axis(new, path[:, :, None], axis=1) for new in (latent, rope_key))
            kept = None if kept is None else jnp.take_along_axis(kept, path, axis=1)
        if self.kept is None and kept is not None:
            raise ValueError("rows with `kept` need a cache made with track_kept=True, got one without")
        offset = jnp.arange(latent.shape[1], dtype=jnp.int32)[None, :]
        slot = jnp.where(offset < count[:, None], self.length[:, None] + offset, self.capacity)
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
