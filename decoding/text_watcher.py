"""Detokenizes each row during decoding: streams the text, and finds stop strings in it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from decodax.decoding.options import GenerateOptions
from decodax.decoding.row_text import RowText
from decodax.decoding.state import DecodeState
from decodax.sharding.host import to_host

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel


class TextWatcher:
    """Reads the rows' new tokens on request; `needed`: whether that must happen during decoding."""

    def __init__(self, lm: "LanguageModel", options: GenerateOptions, prompts: Sequence[np.ndarray]) -> None:
        self.options = options
        self.prompt_lengths = np.asarray([len(prompt) for prompt in prompts])
        self.needed = bool(options.stop_strings or options.on_text)
        self._rows = (
            []
            if lm.tokenizer is None
            else [RowText(lm.tokenizer, prompt.tolist(), options.stop_strings) for prompt in prompts]
        )
        self._streamed = [0] * len(prompts)  # characters given to on_text

    @property
    def text(self) -> list[str]:
        """Each row's text so far, up to a stop string."""
        return [row.text for row in self._rows]

    @property
    def num_kept(self) -> list[int | None]:
        """Tokens of each row up to the one that completed a stop string, None where none has appeared."""
        return [row.num_kept for row in self._rows] or [None] * len(self.prompt_lengths)

    def look(self, state: DecodeState) -> np.ndarray:
        """Reads new tokens; gives Bool[B], true for rows in which a stop string has appeared."""
        tokens, lengths = to_host((state.tokens, state.length))
        for index, row in enumerate(self._rows):
            start = int(self.prompt_lengths[index])
            row.read(tokens[index, start + row.num_read : int(lengths[index])].tolist())
            self._emit(index, hold_back=max((len(stop) - 1 for stop in self.options.stop_strings), default=0))
        return np.asarray([kept is not None for kept in self.num_kept])

    def finish(self) -> None:
        """Streams the text that was held back, once no more tokens come."""
        for index, row in enumerate(self._rows):
            row.finish()
            self._emit(index, hold_back=0)

    def _emit(self, index: int, hold_back: int) -> None:
        row = self._rows[index]
        end = len(row.text) - (hold_back if row.num_kept is None else 0)
        if self.options.on_text and end > self._streamed[index]:
            self.options.on_text(index, row.text[self._streamed[index] : end])
            self._streamed[index] = end
