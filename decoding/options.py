"""The options of `decodax.generate`, under the names that transformers and vLLM use, checked before anything runs."""

import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from decodax.decoding.logits_processors._options import Option
from decodax.decoding.logits_processors.logit_bias import Bias
from decodax.decoding.sampling import Sampling

_SHAPES_A_DRAW = {"top_k": (None, 0, -1), "top_p": (None, 1), "min_p": (None, 0), "typical_p": (None, 1)}


@dataclass(frozen=True)
class GenerateOptions:
    """Options marked * take one value, or one per prompt.

    max_new_tokens: most tokens to add to each prompt; fewer where the model's context ends.
    temperature *: 0 is greedy. top_k *, top_p *, min_p *, typical_p *: cut the tail of the law before a draw.
    repetition_penalty *: transformers' (prompt and output); presence_penalty *, frequency_penalty *: OpenAI's (output).
    logit_bias: {token id: number added to its logit}, or one such dictionary per prompt.
    min_new_tokens *: no stop token before so many new tokens.
    stop: a string or several; a row ends where one appears, and the text ends before it.
    stop_token_ids: token ids that end a row; None means the model's own end tokens, [] none.
    seed *: one number gives every row the same seed, so a prompt's result does not depend on its place in a batch;
        pass several to draw different continuations of one prompt.
    strategy: how tokens are found: a name that `decodax methods` lists (None: "autoregressive"), a `Speculation` made
        of a drafter and a verifier, or a function from a model to a `decode(params, state, max_tokens)`.
    draft: the trained part of a strategy that has one: a folder, a hub id or a loaded model; None for what comes with
        the embedded model.
    draft_tokens: tokens per draft (in a tree: nodes behind the root); None for the strategy's default; "auto" lets
        draft_model choose by measured times, and fall back to plain decoding, with a warning, where no draft pays.
    on_text: called as `on_text(row, piece)` with new text as blocks of tokens arrive (streaming).
    block_tokens: tokens between two looks at the output, where stop strings or `on_text` need them.
    """

    max_new_tokens: int = 128
    temperature: Option = 0.0
    top_k: Option = None
    top_p: Option = None
    min_p: Option = None
    typical_p: Option = None
    repetition_penalty: Option = None
    presence_penalty: Option = None
    frequency_penalty: Option = None
    logit_bias: Bias | Sequence[Bias | None] | None = None
    min_new_tokens: Option = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] | None = None
    seed: int | Sequence[int] | np.ndarray = 0
    strategy: Any = None
    draft: Any = None
    draft_tokens: int | str | None = None
    on_text: Callable[[int, str], None] | None = None
    block_tokens: int = 16

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "block_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of tokens, at least 1, got {value!r}")
        if isinstance(self.draft_tokens, str) and self.draft_tokens != "auto":
            raise ValueError(f"draft_tokens must be a number or 'auto', got {self.draft_tokens!r}")
        if any(not isinstance(text, str) or not text for text in self.stop_strings):
            raise ValueError(f"stop must be one or more non-empty strings, got {self.stop!r}")

    @classmethod
    def read(cls, options: dict[str, Any]) -> Self:
        """The options by name; raises TypeError, with the nearest known name, for one that does not exist."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}"
                raise TypeError(f"generate has no option {name!r}: {hint}")
        return cls(**options)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) and self.stop else tuple(self.stop)

    def seeds(self, num_rows: int) -> np.ndarray:
        """UInt32[B]; raises ValueError when there are neither one nor as many seeds as rows."""
        seeds = np.asarray(self.seed)
        if seeds.dtype.kind not in "iu" or seeds.shape not in ((), (num_rows,)):
            raise ValueError(f"seed must be a whole number, or one per prompt ({num_rows}), got {self.seed!r}")
        return np.broadcast_to(seeds.astype(np.int64) % 2**32, (num_rows,)).astype(np.uint32)

    def sampling(self, num_rows: int, vocab_size: int, end_token_ids: Sequence[int]) -> Sampling:
        """The pipeline that these options ask for; warns where an option shapes a draw that greedy rows never make."""
        if np.all(np.asarray(self.temperature) == 0):
            idle = [
                name
                for name, off in _SHAPES_A_DRAW.items()
                if np.ndim(getattr(self, name)) or getattr(self, name) not in off
            ]
            if idle:
                warnings.warn(
                    f"{', '.join(idle)} changes nothing at temperature 0 (greedy): set temperature above 0 to sample",
                    stacklevel=4,
                )
        names = ("temperature", *_SHAPES_A_DRAW, "repetition_penalty", "presence_penalty", "frequency_penalty")
        chosen = {name: getattr(self, name) for name in (*names, "logit_bias", "min_new_tokens")}
        return Sampling.create(num_rows, vocab_size, end_token_ids=end_token_ids, **chosen)
