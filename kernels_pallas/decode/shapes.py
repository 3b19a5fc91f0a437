"""Defines what named real shapes of the decode kernels share: queries, new tokens, windows; bytes and operations."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from decodax.kernels_pallas.decode.new_tokens import NewTokens


@dataclass(frozen=True)
class DecodeShape:
    """A decoding step on rows of equal length; new tokens are a chain after the staged ones.

    batch: rows.
    num_queries: new tokens per row, T.
    num_heads, num_kv_heads: of queries, of keys and values.
    head_size, value_size: numbers per key and per value.
    capacity: slots of the cache, S.
    length: cached tokens per row.
    num_staged: staged tokens before the new ones.
    window, num_sink_tokens, softcap: as for the kernels.
    has_sink_logits: whether heads have learned sinks.
    dtype: of the operands.
    """

    batch: int
    num_queries: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    value_size: int
    capacity: int
    length: int
    num_staged: int = 0
    window: int | None = None
    num_sink_tokens: int = 0
    softcap: float | None = None
    has_sink_logits: bool = False
    dtype: str = "bfloat16"

    def operands(self) -> dict[str, Any]:
        """The array arguments of the kernel's function, as shapes."""
        rows, num_new = (self.batch, self.num_queries), self.num_queries + self.num_staged
        kept = (self.batch, self.num_kv_heads, num_new)
        new = NewTokens(
            self._floats(*kept, self.head_size),
            self._floats(*kept, self.value_size),
            self._described((*rows, num_new), jnp.bool_),
        )
        operands = {"query": self._floats(*rows, self.num_heads, self.head_size), **self.cache(), "new": new}
        if self.window is not None:
            operands["first"] = self.integers(*rows)
        if self.has_sink_logits:
            operands["sink_logits"] = self._described((self.num_heads,), jnp.float32)
        return operands

    def cache(self) -> dict[str, Any]:
        """The operands that are the cache, or the part of it to attend to."""
        raise NotImplementedError

    def integer(self, name: str, like: jax.ShapeDtypeStruct, seed: jax.Array) -> jax.Array:
        """An integer operand, which selects cached tokens."""
        raise NotImplementedError

    def random_operands(self, seed: int) -> dict[str, Any]:
        """The array arguments: normal numbers, and integers for this shape's cached tokens."""
        seeds = iter(jax.random.split(jax.random.key(seed), 16))
        new_token = jnp.arange(self.num_queries + self.num_staged) - self.num_staged

        def filled(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> jax.Array:
            name = str(getattr(path[-1], "key", getattr(path[-1], "name", "")))
            if name == "allowed":
                return jnp.broadcast_to(new_token[None, :] <= jnp.arange(self.num_queries)[:, None], like.shape)
            if name == "first":
                return jnp.broadcast_to(self.length + jnp.arange(self.num_queries) - (self.window or 0) + 1, like.shape)
            if jnp.issubdtype(like.dtype, jnp.integer):
                return self.integer(name, like, next(seeds)).astype(like.dtype)
            return jax.random.normal(next(seeds), like.shape, like.dtype)

        return jax.tree_util.tree_map_with_path(filled, self.operands())

    def options(self) -> dict[str, Any]:
        """The other arguments."""
        sinks = {} if self.window is None else {"num_sink_tokens": self.num_sink_tokens}
        return {"scale": self.head_size**-0.5, "softcap": self.softcap, **sinks}

    def cached_tokens(self) -> int:
        """Cached tokens that a row and key-value head attends to."""
        if self.window is None:
            return self.length
        return min(self.length, self.window - 1 + self.num_sink_tokens)

    def flops(self) -> int:
        """Operations of the two matrix products."""
        keys = self.cached_tokens() + self.num_queries + self.num_staged
        sizes = self.head_size + self.value_size
        return 2 * self.batch * self.num_heads * self.num_queries * keys * sizes

    def bytes_moved(self) -> int:
        """Bytes of every key and value that is read, queries, output and log-sum-exp, once."""
        sizes = (self.head_size + self.value_size) * jnp.dtype(self.dtype).itemsize
        keys = self.num_kv_heads * (self.cached_tokens() + self.num_queries + self.num_staged)
        queries = self.num_heads * self.num_queries
        return self.batch * ((keys + queries) * sizes + 4 * queries)

    def contiguous(self) -> dict[str, Any]:
        """Keys and values as one buffer."""
        kept = (self.batch, self.num_kv_heads, self.capacity)
        return {"key": self._floats(*kept, self.head_size), "value": self._floats(*kept, self.value_size)}

    def integers(self, *shape: int) -> Any:
        return self._described(shape, jnp.int32)

    def _floats(self, *shape: int) -> Any:
        return self._described(shape, self.dtype)

    def _described(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
