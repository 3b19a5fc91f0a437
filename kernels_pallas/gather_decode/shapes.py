"""Lists named real shapes of `gather_decode`: tests compile the kernels for them, benchmarks time them."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from decodax.kernels_pallas.decode.shapes import DecodeShape


@dataclass(frozen=True)
class Shape(DecodeShape):
    """Each head attends to `num_listed` pages of `block_tokens` of a contiguous cache, random among the filled ones."""

    block_tokens: int = 64
    num_listed: int = 64

    def cache(self) -> dict[str, Any]:
        lists = (self.batch, self.num_kv_heads)
        which = {"index": self.integers(*lists, self.num_listed), "count": self.integers(*lists)}
        return {**self.contiguous(), **which, "length": self.integers(self.batch)}

    def integer(self, name: str, like: jax.ShapeDtypeStruct, seed: jax.Array) -> jax.Array:
        if name == "index":
            filled = self.length // self.block_tokens
            drawn = jax.random.uniform(seed, (*like.shape[:2], filled))
            return jnp.argsort(drawn, axis=-1)[..., : self.num_listed]
        return jnp.full(like.shape, self.num_listed if name == "count" else self.length)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "block_tokens": self.block_tokens}

    def cached_tokens(self) -> int:
        return self.num_listed * self.block_tokens


SHAPES: dict[str, Shape] = {
    "llama3-8b 4k of 32k tokens, batch 8, pages of 64": Shape(8, 1, 32, 8, 128, 128, 32768, 32000),
    "llama3-8b 4k of 128k tokens, batch 8, pages of 16": Shape(
        8, 1, 32, 8, 128, 128, 131072, 131000, block_tokens=16, num_listed=256
    ),
    "llama3-8b chain of 8, 2k of 32k tokens, pages of 32": Shape(
        8, 8, 32, 8, 128, 128, 32768, 32000, block_tokens=32, num_listed=64
    ),
    "llama3.2-1b 4k of 32k tokens, batch 8, pages of 128": Shape(
        8, 1, 32, 8, 64, 64, 32768, 32000, block_tokens=128, num_listed=32
    ),
}
