"""Lists named real shapes of `mla_decode`: tests compile the kernels for them, benchmarks time them."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from decodax.kernels_pallas.mla_decode.new_latents import NewLatents


@dataclass(frozen=True)
class Shape:
    """A decoding step on rows of equal length; the new tokens are a chain.

    batch: rows.
    num_queries: new tokens per row, T.
    num_heads: query heads.
    rank, rope_size: numbers per latent, R, and per rope key, H.
    capacity: slots of the cache, S.
    length: cached tokens per row.
    query_size: of a head before absorption; the scale is its inverse root.
    dtype: of the operands.
    """

    batch: int
    num_queries: int
    num_heads: int
    rank: int
    rope_size: int
    capacity: int
    length: int
    query_size: int
    dtype: str = "bfloat16"

    def operands(self) -> dict[str, Any]:
        """The array arguments of the kernel's function, as shapes."""
        rows, cached = (self.batch, self.num_queries), (self.batch, self.capacity)
        new: tuple[Any, ...] = (
            self._floats(*rows, self.rank),
            self._floats(*rows, self.rope_size),
            jax.ShapeDtypeStruct((*rows, self.num_queries), jnp.bool_),
        )
        return {
            "query_latent": self._floats(*rows, self.num_heads, self.rank),
            "query_rope": self._floats(*rows, self.num_heads, self.rope_size),
            "latent": self._floats(*cached, self.rank),
            "rope_key": self._floats(*cached, self.rope_size),
            "length": jax.ShapeDtypeStruct((self.batch,), jnp.int32),
            "new": NewLatents(*new),
        }

    def random_operands(self, seed: int) -> dict[str, Any]:
        """The array arguments: normal numbers; each new token attends to itself and those before it."""
        seeds = iter(jax.random.split(jax.random.key(seed), 8))

        def filled(like: jax.ShapeDtypeStruct) -> jax.Array:
            if like.dtype == jnp.bool_:
                return jnp.broadcast_to(jnp.tril(jnp.ones(like.shape[1:], bool))[None], like.shape)
            if like.dtype == jnp.int32:
                return jnp.full(like.shape, self.length, jnp.int32)
            return jax.random.normal(next(seeds), like.shape, like.dtype)

        return jax.tree.map(filled, self.operands())

    def options(self) -> dict[str, Any]:
        """The other arguments."""
        return {"scale": self.query_size**-0.5, "softcap": None}

    def flops(self) -> int:
        """Operations of the two matrix products."""
        tokens = self.length + self.num_queries
        return 2 * self.batch * self.num_heads * self.num_queries * tokens * (2 * self.rank + self.rope_size)

    def bytes_moved(self) -> int:
        """Bytes of every latent and rope key that is read, queries, output and log-sum-exp, once."""
        item_bytes = jnp.dtype(self.dtype).itemsize
        tokens = self.length + self.num_queries
        queries = self.num_heads * self.num_queries
        numbers = tokens * (self.rank + self.rope_size) + queries * (2 * self.rank + self.rope_size)
        return self.batch * (numbers * item_bytes + 4 * queries)

    def _floats(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype))


SHAPES: dict[str, Shape] = {
    "deepseek-v3 decode, batch 8, 32k": Shape(8, 1, 128, 512, 64, 32768, 32000, 192),
    "deepseek-v3 decode, heads over eight devices, batch 64, 4k": Shape(64, 1, 16, 512, 64, 4096, 4000, 192),
    "deepseek-v2-lite decode, batch 8, 16k": Shape(8, 1, 16, 512, 64, 16384, 16000, 192),
    "deepseek-v2-lite chain of 4, batch 8, 16k": Shape(8, 4, 16, 512, 64, 16384, 16000, 192),
    "deepseek-v3 chain of 16, batch 8, 8k": Shape(8, 16, 128, 512, 64, 8192, 8000, 192),
    "rank 256, 64 heads, batch 16, 16k": Shape(16, 1, 64, 256, 64, 16384, 16000, 192),
}
