"""Follows the text of each row while it is decoded: streams it, and finds stop strings in it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from decodax.decoding.options import GenerateOptions
from decodax.decoding.state import DecodeState
from decodax.models.tokenizer import StreamDecoder
from decodax.sharding.host import to_host

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel


_PROMPT_TOKENS = 8  # of the prompt, given to the decoder first: some decoders treat the start of a text differently


class TextWatcher:
    """Reads the rows' new tokens when told to; `needed` says whether that must happen while they are decoded."""

    def __init__(self, lm: "LanguageModel", options: GenerateOptions, prompts: Sequence[np.ndarray]) -> None:
        self.options = options
        self.prompt_lengths = np.asarray([len(prompt) for prompt in prompts])
        self.needed = bool(options.stop_strings or options.on_text)
        self.text = [""] * len(prompts)  # text so far, up to a stop string
        self.num_kept: list[int | None] = [None] * len(prompts)  # tokens up to the one that completed a stop string
        self._streamed = [0] * len(prompts)  # characters given to on_text
        self._read = [0] * len(prompts)
        self._decoders = [StreamDecoder(lm.tokenizer) for _ in prompts] if lm.tokenizer is not None else []
        for decoder, prompt in zip(self._decoders, prompts, strict=False):
            decoder.push(prompt[-_PROMPT_TOKENS:].tolist())

    def look(self, state: DecodeState) -> np.ndarray:
        """Reads new tokens; gives Bool[B], true for rows in which a stop string has appeared."""
        tokens, lengths = to_host((state.tokens, state.length))
        for row, decoder in enumerate(self._decoders):
            start = self.prompt_lengths[row]
            while self.num_kept[row] is None and start + self._read[row] < lengths[row]:
                self.text[row] += decoder.push([int(tokens[row, start + self._read[row]])])
                self._read[row] += 1
                self._find_stop(row)
            self._emit(row, hold_back=max((len(s) - 1 for s in self.options.stop_strings), default=0))
        return np.asarray([kept is not None for kept in self.num_kept])

    def finish(self) -> None:
        """Gives out what was held back, once no more tokens come."""
        for row, decoder in enumerate(self._decoders):
            if self.num_kept[row] is None:
                self.text[row] += decoder.flush()
                self._find_stop(row)
            self._emit(row, hold_back=0)

    def _find_stop(self, row: int) -> None:
        found = [at for at in (self.text[row].find(stop) for stop in self.options.stop_strings) if at >= 0]
        if found:
            self.text[row], self.num_kept[row] = self.text[row][: min(found)], self._read[row]

    def _emit(self, row: int, hold_back: int) -> None:
        end = len(self.text[row]) - (hold_back if self.num_kept[row] is None else 0)
        if self.options.on_text and end > self._streamed[row]:
            self.options.on_text(row, self.text[row][self._streamed[row] : end])
            self._streamed[row] = end
