"""Lists named real shapes of `flash_decode`: tests compile the kernels for them, benchmarks time them."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from decodax.kernels_pallas.decode.shapes import DecodeShape


@dataclass(frozen=True)
class Shape(DecodeShape):
    """A contiguous cache."""

    def cache(self) -> dict[str, Any]:
        return {**self.contiguous(), "length": self.integers(self.batch)}

    def integer(self, name: str, like: jax.ShapeDtypeStruct, seed: jax.Array) -> jax.Array:
        return jnp.full(like.shape, self.length)


SHAPES: dict[str, Shape] = {
    "llama3-8b decode, batch 8, 32k": Shape(8, 1, 32, 8, 128, 128, 32768, 32000),
    "llama3-8b tree of 64, batch 8, 8k": Shape(8, 64, 32, 8, 128, 128, 8192, 8000),
    "llama3.2-1b chain of 8, batch 16, 8k": Shape(16, 8, 32, 8, 64, 64, 8192, 8000, num_staged=8),
    "gemma2-9b local layer, batch 8, 32k": Shape(8, 1, 16, 8, 256, 256, 32768, 32000, window=4096, softcap=50.0),
    "gpt-oss-20b local layer, batch 32, 32k": Shape(
        32, 1, 64, 8, 64, 64, 32768, 32000, window=128, has_sink_logits=True
    ),
    "llama3-8b streaming, batch 8, 32k": Shape(8, 1, 32, 8, 128, 128, 32768, 32000, window=2048, num_sink_tokens=4),
    "deepseek-v2-lite without absorption, batch 8, 4k": Shape(8, 1, 16, 16, 192, 128, 4096, 4000),
}
