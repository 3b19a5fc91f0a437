"""Samples among the tokens that surprise about as much as one expects a token to surprise here.

Paper: Locally Typical Sampling (arXiv 2202.00666), equations 7 to 9. Text that people write stays close to the expected
information; so tokens are ranked by how far their information is from the entropy, and the best are kept until they
hold the given probability. The most probable token may be among those cut.
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
class TypicalP(LogitsProcessor):
    """logit -> -inf outside the smallest set of smallest |-log p - entropy| whose probability is at least typical_p.

    1 is off; tokens tied with the last one kept are kept. Probabilities (0.5, 0.3, 0.2) have the entropy 1.030 and the
    informations (0.693, 1.204, 1.609), so distances (0.337, 0.174, 0.580): 0.3 keeps the second, 0.8 the first two.
    """

    typical_p: Float32[Array, "B"]
    help = "Sample among the most typical tokens with this probability in all; 1 is off."
    off = (1,)
    only_sampling = True

    @classmethod
    def create(cls, option: Any, batch: Batch) -> "TypicalP | None":
        rows = per_row(
            "typical_p",
            option,
            batch_size=batch.batch_size,
            neutral=1.0,
            is_valid=lambda value: (value > 0) & (value <= 1),
            expected="above 0 and at most 1 (1: off)",
        )
        return None if (rows == 1).all() else cls(jnp.asarray(rows))

    def __call__(self, logits: Float32[Array, "B V"], history: History) -> Float32[Array, "B V"]:
        log_probability = jax.nn.log_softmax(logits, axis=1)
        probability = jnp.exp(log_probability)
        entropy = -jnp.sum(jnp.where(probability > 0, probability * log_probability, 0.0), axis=1, keepdims=True)
        closeness = -jnp.abs(-log_probability - entropy)
        smallest_kept = cut_threshold(closeness, probability, self.typical_p)
        keep = (closeness >= smallest_kept[:, None]) | (self.typical_p[:, None] >= 1)
        return jnp.where(keep, logits, -jnp.inf)
