"""Forbids the end tokens until a row has written a minimum number of new tokens.

As `min_new_tokens` in transformers and `min_tokens` in vLLM.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from decodax.core import pytree
from decodax.core.arguments import token_ids
from decodax.decoding.logits_processors.contract import Batch, History, LogitsProcessor
from decodax.decoding.option_values import per_row


@pytree.dataclass
class MinNewTokens(LogitsProcessor):
    """logit[end tokens] -> -inf while the row has written fewer than `min_new_tokens`. 0 is off.

    With a minimum of 2, the first and the second new token cannot be an end token; the third can.
    """

    min_new_tokens: Int32[Array, "B"]
    end_tokens: Int32[Array, "M"]  # M: end tokens of the model, the same for all rows
    help = "Forbid end tokens before so many new tokens; 0 is off."
    number = int
    off = (0,)

    @classmethod
    def create(cls, option: Any, batch: Batch) -> "MinNewTokens | None":
        rows = per_row(
            "min_new_tokens",
            option,
            batch_size=batch.batch_size,
            neutral=0,
            whole=True,
            is_valid=lambda value: value >= 0,
            expected="a whole number, 0 or more",
        )
        ends = token_ids("end_token_ids", batch.end_token_ids, batch.vocab_size)
        if (rows == 0).all() or not ends:
            return None
        return cls(jnp.asarray(rows), jnp.asarray(np.asarray(ends, np.int32)))

    def __call__(self, logits: Float32[Array, "B V"], history: History) -> Float32[Array, "B V"]:
        is_end = jnp.zeros(logits.shape[1], bool).at[self.end_tokens].set(True)
        too_short = history.num_new_tokens < self.min_new_tokens
        return jnp.where(too_short[:, None] & is_end[None, :], -jnp.inf, logits)

    def forbidden(self, batch: Batch) -> Bool[np.ndarray, "B V"]:
        found = np.zeros((batch.batch_size, batch.vocab_size), bool)
        found[np.ix_(np.asarray(self.min_new_tokens) > 0, np.asarray(self.end_tokens))] = True
        return found
