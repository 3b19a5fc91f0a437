"""Makes the choice bolder or more careful: probabilities are raised to the power 1 / temperature and renormalised.

Temperature 1 is the model's own distribution, lower is more careful, 0 always takes the most probable token.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32

from decodax.core import pytree
from decodax.decoding.logits_processors.contract import Batch, History, LogitsProcessor
from decodax.decoding.option_values import per_row
from decodax.decoding.top_tokens import argmax_token


@pytree.dataclass
class Temperature(LogitsProcessor):
    """logit -> (logit - largest logit) / temperature; at temperature 0 the largest becomes 0 and all others -inf.

    At 0 a tie goes to the lowest token id. Processors that follow see a distribution with one token in it, so whatever
    they cut, a row at 0 is greedy. With temperature 0.5, logits (4, 3, 1) become (0, -2, -6).
    """

    temperature: Float32[Array, "B"]
    help = "Sample at this temperature; 0, the default, always takes the most probable token."
    off = (0,)
    only_sampling = True

    @classmethod
    def create(cls, option: Any, batch: Batch) -> "Temperature | None":
        rows = per_row(
            "temperature",
            option,
            batch_size=batch.batch_size,
            neutral=0.0,  # greedy where none is given
            is_valid=lambda value: np.isfinite(value) & (value >= 0),
            expected="a finite number, 0 or more (0: always the most probable token)",
        )
        # Above 1e30 every token is as probable as any other; the inverse of 1e38 would already be flushed to 0.
        return None if (rows == 1).all() else cls(jnp.asarray(np.minimum(rows, np.float32(1e30))))

    @property
    def samples(self) -> bool:
        """Whether any row is sampled."""
        return bool((np.asarray(self.temperature) > 0).any())

    def __call__(self, logits: Float32[Array, "B V"], history: History) -> Float32[Array, "B V"]:
        temperature = self.temperature[:, None]
        is_greedy = temperature == 0
        best = argmax_token(logits)[:, None]
        is_best = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == best
        # Taking off the largest changes no probability, and keeps a tiny temperature from overflowing to inf - inf.
        scaled = (logits - jnp.max(logits, axis=1, keepdims=True)) / jnp.where(is_greedy, 1.0, temperature)
        return jnp.where(is_greedy, jnp.where(is_best, 0.0, -jnp.inf), scaled)
