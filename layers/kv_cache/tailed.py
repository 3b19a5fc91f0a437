"""Implements a KV cache with a tail: the last few tokens' inputs of the convolutions before attention.

The tail has a fixed number of tokens, so it adds a constant to the cache's bytes. A cache policy decides in what form
keys and values are stored.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from decodax.core import pytree
from decodax.layers.attention.predecessors import tail_after
from decodax.layers.kv_cache.contract import CachePolicy
from decodax.layers.kv_cache.full import KVUpdate, MarkedCache


@pytree.dataclass
class TailedUpdate:
    """The cache update of the tokens of one forward.

    kv: keys and values.
    columns: inputs of the convolutions of later tokens.
    """

    kv: KVUpdate
    columns: Float[Array, "B T I"]

    @classmethod
    def empty(
        cls, batch_size: int, num_kv_heads: int, num_tokens: int, head_size: int, num_columns: int, dtype: DTypeLike
    ) -> "TailedUpdate":
        """An empty update for tokens that will be staged (see staged.py); sizes are those of its arrays."""
        kv = KVUpdate.empty(batch_size, num_kv_heads, num_tokens, head_size, dtype)
        return cls(kv, jnp.zeros((batch_size, num_tokens, num_columns), dtype))

    def place(self, new: "TailedUpdate", slot: Int[Array, " T"]) -> "TailedUpdate":
        """This update with `new` tokens at the given slots; a slot beyond the last is dropped."""
        columns = self.columns.at[:, slot].set(new.columns.astype(self.columns.dtype), mode="drop")
        return dataclasses.replace(self, kv=self.kv.place(new.kv, slot), columns=columns)


@pytree.dataclass
class TailedCache:
    """A KV cache with a tail.

    kv: keys and values, which attention reads.
    tail: columns of the last W - 1 committed tokens, zero before a row's first token.
    """

    kv: Any
    tail: Float[Array, "B W_minus_1 I"]

    @classmethod
    def empty(
        cls,
        batch_size: int,
        num_kv_heads: int,
        capacity: int,
        head_size: int,
        tail_shape: tuple[int, int],
        dtype: DTypeLike,
        policy: CachePolicy,
    ) -> "TailedCache":
        """An empty cache.

        batch_size, num_kv_heads, capacity, head_size, dtype: as in `CachePolicy.empty`.
        tail_shape: tokens and columns of the tail.
        policy: of keys and values.
        Raises ValueError for MarkedCache: a tail has no gaps.
        """
        if policy is MarkedCache:
            raise ValueError(
                "a layer with convolutions has to run for every token, as later tokens read its columns: "
                "use a method that skips no layers"
            )
        kv = policy.empty(batch_size, num_kv_heads, capacity, head_size, dtype)
        return cls(kv, jnp.zeros((batch_size, *tail_shape), dtype))

    @property
    def length(self) -> Int[Array, " B"]:
        return self.kv.length

    @property
    def capacity(self) -> int:
        return self.kv.capacity

    def empty_like(self) -> "TailedCache":
        """An empty cache of the same form."""
        return TailedCache(self.kv.empty_like(), jnp.zeros_like(self.tail))

    def commit(
        self, update: TailedUpdate, count: Int[Array, " B"], path: Int[Array, "B A"] | None = None
    ) -> "TailedCache":
        """Appends `count[b]` of a row's tokens: the first ones, or those in `path[b]` (node indices of a tree).

        The caller ensures that they fit.
        """
        kv, tail = self.kv.commit(update.kv, count, path), tail_after(self.tail, update.columns, count, path)
        return dataclasses.replace(self, kv=kv, tail=tail)
