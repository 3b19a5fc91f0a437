"""Detokenizes each row during decoding: streams the text, and finds stop strings in it."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from decodax.decoding.options import GenerateOptions
from decodax.decoding.row_text import RowText
from decodax.decoding.state import DecodeState
from decodax.sharding.host import to_host

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel


class RowWatcher:
    """The text of one row as it comes; without a tokenizer there is none."""

    def __init__(self, lm: "LanguageModel", options: GenerateOptions, index: int, prompt: np.ndarray) -> None:
        """index: the row's number, which `on_text` is given."""
        self.prompt_length = len(prompt)
        self.index, self._on_text = index, options.on_text
        self._hold_back = max((len(stop) - 1 for stop in options.stop_strings), default=0)
        self._row = None if lm.tokenizer is None else RowText(lm.tokenizer, prompt.tolist(), options.stop_strings)
        self._streamed = 0  # characters given to on_text

    @property
    def text(self) -> str | None:
        """The text so far, up to a stop string."""
        return None if self._row is None else self._row.text

    @property
    def num_kept(self) -> int | None:
        """Tokens up to the one that completed a stop string, None where none has appeared."""
        return None if self._row is None else self._row.num_kept

    def read(self, tokens: np.ndarray, length: int) -> bool:
        """Reads what is new in a row of prompt and output; whether a stop string has appeared.

        tokens: the row's buffer.
        length: how much of it is filled.
        """
        if self._row is None:
            return False
        self._row.read(tokens[self.prompt_length + self._row.num_read : length].tolist())
        self._emit(self._hold_back)
        return self._row.num_kept is not None

    def end_of(self, tokens: np.ndarray, length: int, end_tokens: Collection[int], *, failed: bool) -> tuple[int, str]:
        """Where the row ends, and why (`Generation.finish_reasons`).

        tokens, length: as for `read`.
        end_tokens: the ids that end it.
        failed: whether its logits became NaN or infinite.
        """
        end = length if self.num_kept is None else self.prompt_length + self.num_kept
        stopped = self.num_kept is not None or (end > self.prompt_length and int(tokens[end - 1]) in end_tokens)
        return end, "failed" if failed else "stop" if stopped else "length"

    def finish(self) -> None:
        """Streams the text that was held back, once no more tokens come."""
        if self._row is not None:
            self._row.finish()
            self._emit(0)

    def _emit(self, hold_back: int) -> None:
        if self._row is None or not self._on_text:
            return
        text = self._row.text
        end = len(text) - (hold_back if self._row.num_kept is None else 0)
        if end > self._streamed:
            self._on_text(self.index, text[self._streamed : end])
            self._streamed = end


class TextWatcher:
    """Reads the rows' new tokens on request; `needed`: whether that must happen during decoding."""

    def __init__(self, lm: "LanguageModel", options: GenerateOptions, prompts: Sequence[np.ndarray]) -> None:
        self.options = options
        self.needed = needs_text(options)
        self.rows = [RowWatcher(lm, options, index, prompt) for index, prompt in enumerate(prompts)]
        self.prompt_lengths = np.asarray([row.prompt_length for row in self.rows])

    def look(self, state: DecodeState) -> np.ndarray:
        """Reads new tokens; gives Bool[B], true for rows in which a stop string has appeared."""
        tokens, lengths = to_host((state.tokens, state.length))
        return np.asarray([row.read(tokens[i], int(lengths[i])) for i, row in enumerate(self.rows)])

    def finish(self) -> None:
        for row in self.rows:
            row.finish()


def needs_text(options: GenerateOptions) -> bool:
    """Whether the text must be read between blocks of tokens."""
    return bool(options.stop_strings or options.on_text)
