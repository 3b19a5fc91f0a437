"""Samples only among tokens that are at least a fraction min_p as probable as the most probable one.

Paper: Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs (arXiv 2407.01082).
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32

from decodax.core import pytree
from decodax.decoding.logits_processors.contract import Batch, History, LogitsProcessor
from decodax.decoding.option_values import per_row


@pytree.dataclass
class MinP(LogitsProcessor):
    """logit -> -inf where its probability is below min_p * (largest probability of the row). 0 is off.

    With min_p = 0.5, probabilities (0.5, 0.3, 0.2) keep the first two. Works on logits: log p differs from them by a
    constant of the row.
    """

    min_p: Float32[Array, "B"]
    help = "Sample among tokens with at least this share of the largest probability; 0 is off."
    off = (0,)
    only_sampling = True

    @classmethod
    def create(cls, option: Any, batch: Batch) -> "MinP | None":
        rows = per_row(
            "min_p",
            option,
            batch_size=batch.batch_size,
            neutral=0.0,
            is_valid=lambda value: (value >= 0) & (value <= 1),
            expected="in 0..1 (0: off)",
        )
        return None if (rows == 0).all() else cls(jnp.asarray(rows))

    def __call__(self, logits: Float32[Array, "B V"], history: History) -> Float32[Array, "B V"]:
        smallest_kept = jnp.max(logits, axis=1) + jnp.log(self.min_p)  # min_p 0 gives -inf: all are kept
        return jnp.where(logits >= smallest_kept[:, None], logits, -jnp.inf)
