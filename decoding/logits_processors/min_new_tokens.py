"""Forbids the end tokens until a row has written a minimum number of new tokens.

As `min_new_tokens` in transformers and `min_tokens` in vLLM.
"""

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from decodax.arguments import token_ids
from decodax.decoding.logits_processors._contract import History
from decodax.decoding.logits_processors._options import Option, per_row
from decodax.layers import pytree


@pytree.dataclass
class MinNewTokens:
    """logit[end tokens] -> -inf while the row has written fewer than `min_new_tokens`. 0 is off.

    With a minimum of 2, the first and the second new token cannot be an end token; the third can.
    """

    min_new_tokens: Int32[Array, "B"]
    end_tokens: Int32[Array, "M"]  # M: end tokens of the model, the same for all rows
    needs_counts: ClassVar[bool] = False

    @classmethod
    def create(cls, option: Option, *, end_token_ids: Any, batch_size: int, vocab_size: int) -> "MinNewTokens | None":
        rows = per_row(
            "min_new_tokens",
            option,
            batch_size=batch_size,
            neutral=0,
            whole=True,
            is_valid=lambda value: value >= 0,
            expected="a whole number, 0 or more",
        )
        ends = token_ids("end_token_ids", end_token_ids, vocab_size)
        if (rows == 0).all() or not ends:
            return None
        return cls(jnp.asarray(rows), jnp.asarray(np.asarray(ends, np.int32)))

    def __call__(self, logits: Float32[Array, "B V"], history: History) -> Float32[Array, "B V"]:
        is_end = jnp.zeros(logits.shape[1], bool).at[self.end_tokens].set(True)
        too_short = history.num_new_tokens < self.min_new_tokens
        return jnp.where(too_short[:, None] & is_end[None, :], -jnp.inf, logits)
