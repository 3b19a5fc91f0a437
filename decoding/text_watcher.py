"""Follows the text of each row while it is decoded: streams it, and finds stop strings in it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from decodax.decoding.options import GenerateOptions
from decodax.decoding.state import DecodeState
from decodax.models.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel


class TextWatcher:
    """Looks at the rows between blocks of tokens; `needed` tells whether anybody wants that."""

    def __init__(self, lm: "LanguageModel", options: GenerateOptions, prompt_lengths: Sequence[int]) -> None:
        self.lm, self.options, self.prompt_lengths = lm, options, prompt_lengths
        self.needed = bool(options.stop_strings or options.on_text)
        count = len(prompt_lengths)
        self.text = [""] * count  # text so far, up to a stop string
        self.streamed = [0] * count  # characters given to on_text
        self.num_kept: list[int | None] = [None] * count  # tokens up to the one that completed a stop string
        self.decoders = [StreamDecoder(lm.tokenizer) for _ in range(count)] if self.needed and lm.tokenizer else []
        self.read = [0] * count

    def look(self, state: DecodeState) -> np.ndarray:
        """Reads new tokens; gives Bool[B], true for rows in which a stop string has appeared."""
        tokens, lengths = np.asarray(state.tokens), np.asarray(state.length)
        for row, decoder in enumerate(self.decoders):
            start = self.prompt_lengths[row]
            while self.num_kept[row] is None and start + self.read[row] < lengths[row]:
                self.text[row] += decoder.push([int(tokens[row, start + self.read[row]])])
                self.read[row] += 1
                self._find_stop(row)
            self._emit(row, hold_back=max((len(s) - 1 for s in self.options.stop_strings), default=0))
        return np.asarray([kept is not None for kept in self.num_kept])

    def finish(self) -> None:
        """Gives out what was held back, once no more tokens come."""
        for row, decoder in enumerate(self.decoders):
            if self.num_kept[row] is None:
                self.text[row] += decoder.flush()
                self._find_stop(row)
            self._emit(row, hold_back=0)

    def _find_stop(self, row: int) -> None:
        found = [at for at in (self.text[row].find(stop) for stop in self.options.stop_strings) if at >= 0]
        if found:
            self.text[row], self.num_kept[row] = self.text[row][: min(found)], self.read[row]

    def _emit(self, row: int, hold_back: int) -> None:
        end = len(self.text[row]) - (hold_back if self.num_kept[row] is None else 0)
        if self.options.on_text and end > self.streamed[row]:
            self.options.on_text(row, self.text[row][self.streamed[row] : end])
            self.streamed[row] = end
