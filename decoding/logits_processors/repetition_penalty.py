"""Makes tokens that already stand in the prompt or in the output less likely, by scaling their logits.

Paper: CTRL: A Conditional Transformer Language Model for Controllable Generation (arXiv 1909.05858), section 4.1. The
paper divides every logit; as in transformers and vLLM, negative logits are multiplied instead, so that a penalty above
1 always lowers the token.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from decodax.core import pytree
from decodax.decoding.logits_processors.contract import Batch, History, LogitsProcessor
from decodax.decoding.option_values import per_row


@pytree.dataclass
class RepetitionPenalty(LogitsProcessor):
    """logit -> logit / penalty if logit > 0 else logit * penalty, for tokens read or written before. 1 is off.

    With penalty 2, logits (4, -3, 1) of which the first two were seen become (2, -6, 1).
    """

    penalty: Float32[Array, "B"]
    help = "Lower the logits of tokens in the prompt or the output; 1 is off."
    off = (1,)
    needs_counts = True

    @classmethod
    def create(cls, option: Any, batch: Batch) -> "RepetitionPenalty | None":
        rows = per_row(
            "repetition_penalty",
            option,
            batch_size=batch.batch_size,
            neutral=1.0,
            is_valid=lambda value: np.isfinite(value) & (value > 0),
            expected="a finite number above 0 (1: off)",
        )
        return None if (rows == 1).all() else cls(jnp.asarray(rows))

    def __call__(self, logits: Float32[Array, "B V"], history: History) -> Float32[Array, "B V"]:
        in_prompt, in_output = history.counts()
        seen = (in_prompt > 0) | (in_output > 0)
        penalty = self.penalty[:, None]
        return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
