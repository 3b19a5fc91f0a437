"""Adds a chosen number to the logits of chosen tokens; -inf forbids a token.

As in OpenAI's API and vLLM: a mapping from token id to bias, here one for all rows or one per row.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from decodax.core import pytree
from decodax.core.arguments import in_order, is_integer, is_number, plain, refusal, shown
from decodax.decoding.logits_processors.contract import Batch, History, LogitsProcessor
from decodax.decoding.option_values import to_float32

Bias = Mapping[int, float]


def _read(bias: Any, vocab_size: int, where: str) -> dict[int, np.float32]:
    """One mapping with ints and float32 numbers in it; None is an empty one.

    Raises ValueError for a token outside the vocabulary, or a bias that would turn a logit into NaN or +inf.
    """
    if bias is None:
        return {}
    if not isinstance(bias, Mapping):
        raise refusal("logit_bias", "a mapping from token ids to numbers", bias, where)
    read = {}
    for token, value in ((plain(token), plain(value)) for token, value in bias.items()):
        if not is_integer(token) or not 0 <= token < vocab_size:
            raise ValueError(
                f"logit_bias: token ids must be in 0..{vocab_size - 1} (vocabulary), got {shown(token)}{where}"
            )
        rounded = to_float32(value) if is_number(value) else np.float32(np.nan)
        if np.isnan(rounded) or rounded == np.inf:
            raise ValueError(
                f"logit_bias: a bias must be a finite number or -inf, got {shown(value)} for token {token}{where}"
            )
        read[int(token)] = rounded
    return read


@pytree.dataclass
class LogitBias(LogitsProcessor):
    """logit[tokens] -> logit[tokens] + bias; entries whose token is the vocabulary size are padding.

    Logits (4, 3, 1) with the bias {0: -1.5, 2: -inf} become (2.5, 3, -inf).
    """

    tokens: Int32[Array, "B M"]  # M: entries per row, the longest row's rounded up to a power of two
    bias: Float32[Array, "B M"]
    help = "Add numbers to the logits of tokens: {token id: number}."
    number = None

    @classmethod
    def create(cls, option: Any, batch: Batch) -> "LogitBias | None":
        """`option` is a mapping (`Bias`), or one per row; None is none."""
        several = None if isinstance(option, Mapping) else in_order(option)
        if several is None:
            rows = [_read(option, batch.vocab_size, "")] * batch.batch_size
        else:
            rows = [_read(bias, batch.vocab_size, f" in row {row}") for row, bias in enumerate(several)]
        if len(rows) != batch.batch_size:
            raise ValueError(
                f"logit_bias must be one mapping, or one per row ({batch.batch_size} rows), got {len(rows)}"
            )
        longest = max((len(row) for row in rows), default=0)
        if longest == 0:
            return None
        num_entries = 1 << (longest - 1).bit_length()  # so that a few more entries do not recompile
        tokens = np.full((batch.batch_size, num_entries), batch.vocab_size, np.int32)
        bias = np.zeros((batch.batch_size, num_entries), np.float32)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = list(row.keys())
            bias[index, : len(row)] = list(row.values())
        return cls(jnp.asarray(tokens), jnp.asarray(bias))

    def __call__(self, logits: Float32[Array, "B V"], history: History) -> Float32[Array, "B V"]:
        row = jnp.arange(logits.shape[0])[:, None]
        return logits.at[row, self.tokens].add(self.bias, mode="drop")

    def forbidden(self, batch: Batch) -> Bool[np.ndarray, "B V"]:
        found = np.zeros((batch.batch_size, batch.vocab_size + 1), bool)  # one more for the padding
        row, entry = np.nonzero(np.isneginf(np.asarray(self.bias)))
        found[row, np.asarray(self.tokens)[row, entry]] = True
        return found[:, : batch.vocab_size]
