"""Samples only among the k most probable tokens.

Paper: Hierarchical Neural Story Generation (arXiv 1805.04833), section 5.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from decodax.core import pytree
from decodax.decoding.logits_processors._threshold import cut_threshold
from decodax.decoding.logits_processors.contract import Batch, History, LogitsProcessor
from decodax.decoding.option_values import per_row


@pytree.dataclass
class TopK(LogitsProcessor):
    """logit -> -inf where it is below the k-th largest logit of its row. 0, -1 or None is off.

    Tokens tied with the k-th are all kept, as in transformers: with k = 2, logits (4, 3, 3, 1) become (4, 3, 3, -inf).
    """

    top_k: Int32[Array, "B"]  # the vocabulary size where a row is off
    help = "Sample among the k most probable tokens; 0 or -1 is off."
    number = int
    off = (0, -1)
    only_sampling = True

    @classmethod
    def create(cls, option: Any, batch: Batch) -> "TopK | None":
        rows = per_row(
            "top_k",
            option,
            batch_size=batch.batch_size,
            neutral=0,
            whole=True,
            is_valid=lambda value: value >= -1,
            expected="a whole number, 1 or more (0, -1 or None: off)",
        )
        rows = np.where(rows < 1, batch.vocab_size, np.minimum(rows, batch.vocab_size))
        return None if (rows == batch.vocab_size).all() else cls(jnp.asarray(rows, jnp.int32))

    def __call__(self, logits: Float32[Array, "B V"], history: History) -> Float32[Array, "B V"]:
        # Counting in float32 is exact: a vocabulary is far below 2**24.
        smallest_kept = cut_threshold(logits, jnp.ones_like(logits), self.top_k.astype(jnp.float32))
        return jnp.where(logits >= smallest_kept[:, None], logits, -jnp.inf)
