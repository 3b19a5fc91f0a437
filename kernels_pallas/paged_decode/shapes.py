"""Lists named real shapes of `paged_decode`: tests compile the kernels for them, benchmarks time them."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from decodax.kernels_pallas.decode.shapes import DecodeShape


@dataclass(frozen=True)
class Shape(DecodeShape):
    """A pool with only the rows' pages, in random order; `per_head`: a table and pages for each head."""

    page_tokens: int = 64
    per_head: bool = False

    def cache(self) -> dict[str, Any]:
        tables = self.num_kv_heads if self.per_head else 1
        heads, per_table = self.num_kv_heads // tables, self.capacity // self.page_tokens
        pages = (self.batch * tables * per_table, heads, self.page_tokens)
        return {
            "key_pages": jax.ShapeDtypeStruct((*pages, self.head_size), jnp.dtype(self.dtype)),
            "value_pages": jax.ShapeDtypeStruct((*pages, self.value_size), jnp.dtype(self.dtype)),
            "table": self.integers(self.batch, tables, per_table),
            "length": self.integers(self.batch, tables),
        }

    def integer(self, name: str, like: jax.ShapeDtypeStruct, seed: jax.Array) -> jax.Array:
        if name == "table":
            return jax.random.permutation(seed, like.size).reshape(like.shape)
        return jnp.full(like.shape, self.length)


SHAPES: dict[str, Shape] = {
    "llama3-8b decode, batch 8, 32k, pages of 64": Shape(8, 1, 32, 8, 128, 128, 32768, 32000),
    "llama3-8b decode, batch 64, 4k, pages of 16": Shape(64, 1, 32, 8, 128, 128, 4096, 4000, page_tokens=16),
    "llama3-8b tree of 64, batch 8, 8k, pages of 256": Shape(8, 64, 32, 8, 128, 128, 8192, 8000, page_tokens=256),
    "llama3-8b a table per head, batch 8, 32k, pages of 64": Shape(8, 1, 32, 8, 128, 128, 32768, 32000, per_head=True),
    "gemma2-9b local layer, batch 8, 32k, pages of 128": Shape(
        8, 1, 16, 8, 256, 256, 32768, 32000, window=4096, softcap=50.0, page_tokens=128
    ),
}
