"""A cache of keys and values with a tail: what convolutions in front of the attention read of the last few tokens.

The tail holds numbers per token, not per layer's whole past, so it adds a constant to the cache's bytes. The keys and
values behind it are kept in whatever form a policy keeps them.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from decodax.layers import pytree
from decodax.layers.attention.predecessors import tail_after
from decodax.layers.kv_cache._contract import CachePolicy
from decodax.layers.kv_cache.full import KVRows, MarkedCache


@pytree.dataclass
class TailedRows:
    """Keys and values of the tokens of one forward, and the columns that the tokens behind them convolve."""

    kv: KVRows
    columns: Float[Array, "B T I"]

    @classmethod
    def empty(
        cls, batch_size: int, num_kv_heads: int, num_tokens: int, head_size: int, num_columns: int, dtype: DTypeLike
    ) -> "TailedRows":
        """Room for tokens that are to be staged (see staged.py)."""
        kv = KVRows.empty(batch_size, num_kv_heads, num_tokens, head_size, dtype)
        return cls(kv, jnp.zeros((batch_size, num_tokens, num_columns), dtype))

    def place(self, new: "TailedRows", slot: Int[Array, " T"]) -> "TailedRows":
        """These rows with `new` ones at the given slots; a slot beyond them is dropped."""
        columns = self.columns.at[:, slot].set(new.columns.astype(self.columns.dtype), mode="drop")
        return dataclasses.replace(self, kv=self.kv.place(new.kv, slot), columns=columns)


@pytree.dataclass
class TailedCache:
    """`kv`, the keys and values (what attention reads), and the columns of the W - 1 tokens committed last.

    `tail` is zero before a row's first token.
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
        """tail_shape: tokens and columns of the tail. Raises ValueError for MarkedCache: a tail has no gaps."""
        if policy is MarkedCache:
            raise ValueError(
                "a layer with convolutions has to run for every token, as the tokens behind it read its columns: "
                "use a method that leaves out no layers for some of the tokens"
            )
        kv = policy.empty(batch_size, num_kv_heads, capacity, head_size, dtype)
        return cls(kv, jnp.zeros((batch_size, *tail_shape), dtype))

    @property
    def length(self) -> Int[Array, " B"]:
        return self.kv.length

    @property
    def capacity(self) -> int:
        return self.kv.capacity

    def commit(self, rows: TailedRows, count: Int[Array, " B"], path: Int[Array, "B A"] | None = None) -> "TailedCache":
        """Appends `count[b]` of a row's tokens: the first ones, or those listed in `path[b]` (node indices of a tree).

        The caller makes sure that they fit.
        """
        kv, tail = self.kv.commit(rows.kv, count, path), tail_after(self.tail, rows.columns, count, path)
        return dataclasses.replace(self, kv=kv, tail=tail)
