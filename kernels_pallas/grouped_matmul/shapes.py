"""Lists expert layers of published models, for tests and benchmarks.

Sizes are from the models' released configs: Mixtral (arXiv 2401.04088), DeepSeek-V2-Lite (arXiv 2405.04434),
Qwen3-30B-A3B (arXiv 2505.09388).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Shape:
    """An expert layer.

    num_tokens: before routing.
    num_experts, experts_per_token: of the layer, and chosen by each token.
    input_size, output_size: D and F.
    gated: gate and up at once.
    dtype: of the operands.
    """

    num_tokens: int
    num_experts: int
    experts_per_token: int
    input_size: int
    output_size: int
    gated: bool = False
    dtype: str = "bfloat16"

    @property
    def num_rows(self) -> int:
        return self.num_tokens * self.experts_per_token

    def operands(self) -> dict[str, Any]:
        """The array arguments of `grouped_matmul`, or of `grouped_gate_up` if gated, as shapes."""
        dtype = jnp.dtype(self.dtype)
        weight = jax.ShapeDtypeStruct((self.num_experts, self.output_size, self.input_size), dtype)
        return {
            "tokens": jax.ShapeDtypeStruct((self.num_rows, self.input_size), dtype),
            **({"gate": weight, "up": weight} if self.gated else {"weight": weight}),
            "group_sizes": jax.ShapeDtypeStruct((self.num_experts,), jnp.int32),
        }

    def random_operands(self, seed: int) -> dict[str, jax.Array]:
        """The array arguments, with `group_sizes()`."""
        operands = self.operands()
        seeds = dict(zip(operands, jax.random.split(jax.random.key(seed), len(operands)), strict=True))

        def filled(name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
            if name == "group_sizes":
                return jnp.asarray(self.group_sizes(), like.dtype)
            return jax.random.normal(seeds[name], like.shape, like.dtype) * jnp.asarray(
                1.0 if name == "tokens" else self.input_size**-0.5, like.dtype
            )

        return {name: filled(name, like) for name, like in operands.items()}

    def options(self) -> dict[str, Any]:
        return {}

    def group_sizes(self) -> np.ndarray:
        """Rows per expert if every token picks distinct random experts; the same for every call."""
        random = np.random.default_rng(0)
        picked = np.stack(
            [random.permutation(self.num_experts)[: self.experts_per_token] for _ in range(self.num_tokens)]
        )
        return np.bincount(picked.ravel(), minlength=self.num_experts).astype(np.int32)

    def bytes_moved(self) -> int:
        """Bytes that must be read and written once: tokens, the weights of experts that have tokens, and the result."""
        visited = int(np.count_nonzero(self.group_sizes())) * (2 if self.gated else 1)
        numbers = self.num_rows * (self.input_size + self.output_size) + visited * self.input_size * self.output_size
        return numbers * jnp.dtype(self.dtype).itemsize

    def flops(self) -> int:
        """Operations of the products; the activation is not counted."""
        return 2 * self.num_rows * self.input_size * self.output_size * (2 if self.gated else 1)


SHAPES = {
    "mixtral-8x7b gate and up, prefill 4k": Shape(4096, 8, 2, 4096, 14336, gated=True),
    "mixtral-8x7b down, prefill 4k": Shape(4096, 8, 2, 14336, 4096),
    "mixtral-8x7b gate and up, decode, batch 8": Shape(8, 8, 2, 4096, 14336, gated=True),
    "deepseek-v2-lite one product, prefill 4k": Shape(4096, 64, 6, 2048, 1408),
    "deepseek-v2-lite gate and up, prefill 4k": Shape(4096, 64, 6, 2048, 1408, gated=True),
    "deepseek-v2-lite gate and up, decode, batch 8": Shape(8, 64, 6, 2048, 1408, gated=True),
    "deepseek-v2-lite down, decode, batch 8": Shape(8, 64, 6, 1408, 2048),
    "qwen3-30b-a3b gate and up, prefill 4k": Shape(4096, 128, 8, 2048, 768, gated=True),
    "qwen3-30b-a3b one product, decode, batch 8": Shape(8, 128, 8, 2048, 768),
}
