"""Samples among the tokens that surprise about as much as one expects a token to surprise here.

Paper: Locally Typical Sampling (arXiv 2202.00666), equations 7 to 9. Text that people write stays close to the expected
information; so tokens are ranked by how far their information is from the entropy, and the best are kept until they
hold the given probability. The most probable token may be among those cut.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from decodax.decoding.logits_processors._contract import History
from decodax.decoding.logits_processors._options import Option, per_row
from decodax.decoding.logits_processors._threshold import cut_threshold
from decodax.layers import pytree


@pytree.dataclass
class TypicalP:
    """logit -> -inf outside the smallest set of smallest |-log p - entropy| whose probability is at least typical_p.

    1 is off; tokens tied with the last one kept are kept. Probabilities (0.5, 0.3, 0.2) have the entropy 1.030 and the
    informations (0.693, 1.204, 1.609), so distances (0.337, 0.174, 0.580): 0.3 keeps the second, 0.8 the first two.
    """

    typical_p: Float32[Array, "B"]
    needs_counts: ClassVar[bool] = False

    @classmethod
    def create(cls, option: Option, *, batch_size: int) -> "TypicalP | None":
        rows = per_row(
            "typical_p",
            option,
            batch_size=batch_size,
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
