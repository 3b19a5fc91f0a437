"""The contract of this folder: logits of the next token in, changed logits out.

A processor is one frozen dataclass: its option, the check of the option, and its effect. Its settings are arrays with
one value per row, so that two rows of a batch may differ and a new value never recompiles. What it may look at besides
the logits is in `History`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32

from decodax.core import pytree
from decodax.layers.kv_cache.write import write_tokens


@pytree.dataclass
class History:
    """What a row has read and written so far.

    Counts cost 8 bytes per row and vocabulary entry, and are kept where an active processor has `needs_counts`; tokens
    where one has `needs_tokens`. A token tree has a history per row and node, as if the path to it had been written.

    prompt_counts, output_counts: how often each token stands in the prompt and in the output; None where not kept.
    num_new_tokens: tokens written.
    tokens: of the prompt and the output, filled up to `length`; None where not kept.
    """

    prompt_counts: Int32[Array, "*rows V"] | None
    output_counts: Int32[Array, "*rows V"] | None
    num_new_tokens: Int32[Array, "*rows"]
    tokens: Int[Array, "*rows room"] | None = None
    length: Int[Array, "*rows"] | None = None

    @classmethod
    def start(
        cls,
        tokens: Int[Array, "B room"],
        length: Int[Array, "B"],
        *,
        vocab_size: int,
        with_counts: bool,
        with_tokens: bool = False,
    ) -> "History":
        """The history of rows whose prompt is the first `length` of `tokens`, and which have written nothing."""
        num_rows, num_tokens = tokens.shape
        num_new_tokens = jnp.zeros(num_rows, jnp.int32)
        kept = (tokens, length) if with_tokens else (None, None)
        if not with_counts:
            return cls(None, None, num_new_tokens, *kept)
        is_prompt = jnp.arange(num_tokens)[None, :] < length[:, None]
        zeros = jnp.zeros((num_rows, vocab_size), jnp.int32)
        counts = zeros.at[jnp.arange(num_rows)[:, None], tokens].add(is_prompt.astype(jnp.int32), mode="drop")
        return cls(counts, zeros, num_new_tokens, *kept)

    def counts(self) -> tuple[Int32[Array, "B V"], Int32[Array, "B V"]]:
        """Counts in the prompt and in the output; raises ValueError where they are not kept."""
        if self.prompt_counts is None or self.output_counts is None:
            raise ValueError(
                "a processor needs token counts, but the history holds none: "
                "start it with with_counts=sampling.needs_counts"
            )
        return self.prompt_counts, self.output_counts

    def record(self, token: Int[Array, "B A"], count: Int[Array, "B"]) -> "History":
        """The history after each row wrote the first `count` of its tokens."""
        offset = jnp.arange(token.shape[1], dtype=jnp.int32)[None, :]
        is_written = offset < count[:, None]
        counts, tokens, length = self.output_counts, self.tokens, self.length
        if counts is not None:
            row = jnp.arange(token.shape[0])[:, None]
            counts = counts.at[row, token].add(is_written.astype(jnp.int32), mode="drop")
        if tokens is not None and length is not None:
            slot = jnp.where(is_written, length[:, None] + offset, tokens.shape[1])
            tokens, length = write_tokens(tokens, token, slot, axis=1), length + count
        return History(self.prompt_counts, counts, self.num_new_tokens + count, tokens, length)


@dataclass(frozen=True)
class Batch:
    """What the options of a batch are read for.

    batch_size: rows. vocab_size: tokens of the vocabulary. end_token_ids: token ids that end a row, as a program passed
        them.
    """

    batch_size: int
    vocab_size: int
    end_token_ids: Any = ()


class LogitsProcessor:
    """One way to change the logits of the next token, row by row, and the option of `generate` that asks for it.

    The option has the processor's name in `METHODS`. The input holds no NaN and at least one finite value per row, and
    so does the output. A forbidden token is -inf.

    help: what the option does, in one line, for documents and the command line.
    number: int or float, the kind of number that the option is; None where it is something else.
    off: values of the option that leave every row as it is; None always does.
    needs_counts, needs_tokens: whether the counts, or the tokens, of `History` are read.
    only_sampling: whether it changes nothing in greedy rows, whose argmax stays.
    """

    help: ClassVar[str]
    number: ClassVar[type | None] = float
    off: ClassVar[tuple[Any, ...]] = ()
    needs_counts: ClassVar[bool] = False
    needs_tokens: ClassVar[bool] = False
    only_sampling: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """What a profile and messages call it."""
        return type(self).__name__

    @classmethod
    def create(cls, option: Any, batch: Batch) -> "LogitsProcessor | None":
        """The processor for one option of a batch, read on the host; None where it leaves every row as it is.

        Raises ValueError, naming the option, for a value that has no meaning.
        """
        raise NotImplementedError(f"{cls.__name__} must say how its option is read")

    def __call__(self, logits: Float32[Array, "B V"], history: History) -> Float32[Array, "B V"]:
        raise NotImplementedError(f"{type(self).__name__} must say what it makes of logits")

    def forbidden(self, batch: Batch) -> Bool[np.ndarray, "B V"] | None:
        """Tokens that a row cannot have as its next one, as far as the option alone says; None for none."""
        return None
