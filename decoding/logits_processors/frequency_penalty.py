"""Lowers the logit of a token in proportion to how often it was already written.

As in OpenAI's API and vLLM: only the output counts, not the prompt. A negative penalty encourages repetition.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from decodax.core import pytree
from decodax.decoding.logits_processors.contract import Batch, History, LogitsProcessor
from decodax.decoding.option_values import per_row


@pytree.dataclass
class FrequencyPenalty(LogitsProcessor):
    """logit -> logit - penalty * (times the token was written). 0 is off.

    With penalty 0.5, logits (4, 3, 1) of tokens written 0, 1 and 3 times become (4, 2.5, -0.5).
    """

    penalty: Float32[Array, "B"]
    help = "Lower the logits of tokens in the output, per occurrence; 0 is off."
    off = (0,)
    needs_counts = True

    @classmethod
    def create(cls, option: Any, batch: Batch) -> "FrequencyPenalty | None":
        rows = per_row(
            "frequency_penalty",
            option,
            batch_size=batch.batch_size,
            neutral=0.0,
            is_valid=np.isfinite,
            expected="a finite number (0: off)",
        )
        return None if (rows == 0).all() else cls(jnp.asarray(rows))

    def __call__(self, logits: Float32[Array, "B V"], history: History) -> Float32[Array, "B V"]:
        _, in_output = history.counts()
        return logits - self.penalty[:, None] * in_output.astype(jnp.float32)
