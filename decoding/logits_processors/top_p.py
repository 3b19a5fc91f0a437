"""Samples only among the most probable tokens that together hold probability p (the nucleus).

Paper: The Curious Case of Neural Text Degeneration (arXiv 1904.09751), section 3.1.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from decodax.core import pytree
from decodax.decoding.logits_processors._threshold import cut_threshold
from decodax.decoding.logits_processors.contract import Batch, History, LogitsProcessor
from decodax.decoding.option_values import per_row


@pytree.dataclass
class TopP(LogitsProcessor):
    """logit -> -inf outside the smallest set of most probable tokens whose probability is at least p. 1 is off.

    With p = 0.7, probabilities (0.5, 0.3, 0.2) keep the first two, with p = 0.5 the first. Tokens tied with the last
    one kept are kept too, so that which of them may be drawn does not depend on their ids.
    """

    top_p: Float32[Array, "B"]
    help = "Sample among the fewest most probable tokens with this probability in all; 1 is off."
    off = (1,)
    only_sampling = True

    @classmethod
    def create(cls, option: Any, batch: Batch) -> "TopP | None":
        rows = per_row(
            "top_p",
            option,
            batch_size=batch.batch_size,
            neutral=1.0,
            is_valid=lambda value: (value > 0) & (value <= 1),
            expected="above 0 and at most 1 (1: off)",
        )
        return None if (rows == 1).all() else cls(jnp.asarray(rows))

    def __call__(self, logits: Float32[Array, "B V"], history: History) -> Float32[Array, "B V"]:
        smallest_kept = cut_threshold(logits, jax.nn.softmax(logits, axis=1), self.top_p)
        # Rounding may bring a sum to 1 before the last token, so a row that is off does not ask the sum.
        keep = (logits >= smallest_kept[:, None]) | (self.top_p[:, None] >= 1)
        return jnp.where(keep, logits, -jnp.inf)
