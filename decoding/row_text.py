"""Detokenizes one row of output incrementally, up to the first stop string.

The text has no special tokens, but a stop string may hold some ("<|im_end|>", "\\n</s>"). Such a string is searched for
in the text with special tokens, and its start is mapped to the text without.
"""

from bisect import bisect_right
from collections.abc import Sequence

from decodax.models.tokenizers.tokenizer import Tokenizer


class RowText:
    """The text of one row; mutable.

    text: the text so far, up to a stop string.
    num_read: tokens read.
    num_kept: tokens up to the one that completed a stop string, None before.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.text = ""
        self.num_read = 0
        self.num_kept: int | None = None
        special = [text for text in tokenizer.special_tokens.values() if text]
        with_special = [stop for stop in stops if any(text in stop for text in special)]
        self._stops = stops
        self._decoder = tokenizer.stream(prompt)
        self._marked = _MarkedText(tokenizer, prompt, with_special) if with_special else None

    def read(self, tokens: Sequence[int]) -> None:
        """Adds the text of these tokens, but for those after a stop string."""
        for token in tokens:
            if self.num_kept is not None:
                return
            self.text += self._decoder.push([token])
            self.num_read += 1
            if self._marked is not None:
                self._marked.push(token, len(self.text))
            self._find_stop()

    def finish(self) -> None:
        """Adds the text that was held back, once no more tokens come."""
        if self.num_kept is None:
            self.text += self._decoder.flush()
            if self._marked is not None:
                self._marked.flush(len(self.text))
            self._find_stop()

    def _find_stop(self) -> None:
        if not self._stops:
            return
        found = [at for at in (self.text.find(stop) for stop in self._stops) if at >= 0]
        if self._marked is not None:
            found += self._marked.find()
        if found:
            self.text, self.num_kept = self.text[: min(found)], self.num_read


class _MarkedText:
    """A row's text with its special tokens, and where each token ends in it and in the text without them."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._stops = stops
        self._decoder = tokenizer.stream(prompt, skip_special_tokens=False)
        self._text = ""
        self._ends = [0]
        self._plain_ends = [0]

    def push(self, token: int, plain_length: int) -> None:
        """One more token, after which the text without special tokens has `plain_length` characters."""
        self._add(self._decoder.push([token]), plain_length)

    def flush(self, plain_length: int) -> None:
        self._add(self._decoder.flush(), plain_length)

    def _add(self, piece: str, plain_length: int) -> None:
        self._text += piece
        self._ends.append(len(self._text))
        self._plain_ends.append(plain_length)

    def find(self) -> list[int]:
        """Where stop strings begin, as a number of characters of the text without special tokens."""
        found = (self._text.find(stop) for stop in self._stops)
        return [self._plain(at) for at in found if at >= 0]

    def _plain(self, at: int) -> int:
        """The offset in the text without special tokens; inside a special token, where that token was left out."""
        token = bisect_right(self._ends, at)  # the token whose text holds the offset
        from_end = self._plain_ends[token] - (self._ends[token] - at)
        return max(self._plain_ends[token - 1], from_end)
