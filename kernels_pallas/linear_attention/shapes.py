"""Lists sizes of linear attention in published models, for tests and benchmarks."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Shape:
    """A prefill with an initial and a final state.

    batch, num_tokens, num_heads: B, T and N.
    key_size, value_size: H and I.
    per_channel: a decay per channel of the keys, or one per head.
    dtype: of queries, keys and values.
    """

    batch: int
    num_tokens: int
    num_heads: int
    key_size: int
    value_size: int
    per_channel: bool
    dtype: str = "bfloat16"

    def operands(self) -> dict[str, Any]:
        """The array arguments of `linear_attention`, as shapes."""
        tokens = (self.batch, self.num_tokens, self.num_heads)
        query = jax.ShapeDtypeStruct((*tokens, self.key_size), jnp.dtype(self.dtype))
        return {
            "query": query,
            "key": query,
            "value": jax.ShapeDtypeStruct((*tokens, self.value_size), jnp.dtype(self.dtype)),
            "log_decay": jax.ShapeDtypeStruct((*tokens, self.decay_size), jnp.float32),
            "state": jax.ShapeDtypeStruct((self.batch, self.num_heads, self.key_size, self.value_size), jnp.float32),
            "length": jax.ShapeDtypeStruct((self.batch,), jnp.int32),
        }

    def random_operands(self, seed: int) -> dict[str, jax.Array]:
        """The array arguments with decays of about 0.95 per token, all tokens existing."""
        seeds = dict(zip(self.operands(), jax.random.split(jax.random.key(seed), 6), strict=True))

        def filled(name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
            if name == "length":
                return jnp.full(like.shape, self.num_tokens, jnp.int32)
            normal = jax.random.normal(seeds[name], like.shape, jnp.float32)
            return (-0.05 * jnp.abs(normal) if name == "log_decay" else normal).astype(like.dtype)

        return {name: filled(name, like) for name, like in self.operands().items()}

    def options(self) -> dict[str, Any]:
        return {"scale": self.key_size**-0.5}

    @property
    def decay_size(self) -> int:
        return self.key_size if self.per_channel else 1

    def bytes_moved(self) -> int:
        """Bytes that must be read and written once: queries, keys, values, decays, outputs; the state twice."""
        width = 2 * (self.key_size + self.value_size) * jnp.dtype(self.dtype).itemsize + 4 * self.decay_size
        per_head = self.num_tokens * width + 2 * 4 * self.key_size * self.value_size
        return self.batch * self.num_heads * per_head

    def flops(self) -> int:
        """Operations of the recurrence's own products (query with state, key with value); a chunked form has more."""
        return 4 * self.batch * self.num_tokens * self.num_heads * self.key_size * self.value_size


SHAPES = {
    # hidden 2048, 4 heads, keys half of it, values all of it (arXiv 2312.06635)
    "gla-1.3b prefill, batch 8, 4k": Shape(8, 4096, 4, 256, 512, per_channel=True),
    # 64 heads of 128, a fixed decay per head (MiniMax-01, arXiv 2501.08313)
    "minimax-01 lightning prefill, 16k": Shape(1, 16384, 64, 128, 128, per_channel=False),
    # 32 heads of 128 with a gate per head; the delta rule of that model is another kernel
    "qwen3-next sizes, batch 2, 8k": Shape(2, 8192, 32, 128, 128, per_channel=False),
    # 32 heads of 128 with a gate per channel (arXiv 2510.26692); the delta rule of that model is another kernel
    "kimi-linear sizes, batch 2, 8k": Shape(2, 8192, 32, 128, 128, per_channel=True),
    # 80 heads of 64 with states of 128 (Mamba-2 2.7B, arXiv 2405.21060)
    "mamba2-2.7b prefill, batch 4, 4k": Shape(4, 4096, 80, 128, 64, per_channel=False),
}
