"""Detokenizes one row of output incrementally, up to the first stop string.

The text has no special tokens, but a stop string may hold some ("<|im_end|>", "\\n</s>"). Such a string is searched for
in the text with special tokens, and its start is mapped to the text without.
"""

from bisect import bisect_right
from collections.abc import Sequence

from decodax.models.tokenizers.tokenizer import Tokenizer


class RowText:
    """The text of one row; mutable.

    num_read: tokens read.
    num_kept: tokens up to the one that completed a stop string, None before.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.num_read = 0
        self.num_kept: int | None = None
        special = [text for text in tokenizer.special_tokens.values() if text]
        with_special = [stop for stop in stops if any(text in stop for text in special)]
        self._pieces: list[str] = []
        self._search = _StopSearch(stops)
        self._decoder = tokenizer.stream(prompt)
        self._marked = _MarkedText(tokenizer, prompt, with_special) if with_special else None

    @property
    def text(self) -> str:
        """The text so far, up to a stop string."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def read(self, tokens: Sequence[int]) -> None:
        """Adds the text of these tokens, but for those after a stop string."""
        for token in tokens:
            if self.num_kept is not None:
                return
            self.num_read += 1
            found = self._add(self._decoder.push([token]))
            if self._marked is not None:
                found += self._marked.push(token, self._search.length)
            self._end_at(found)

    def finish(self) -> None:
        """Adds the text that was held back, once no more tokens come."""
        if self.num_kept is None:
            found = self._add(self._decoder.flush())
            if self._marked is not None:
                found += self._marked.flush(self._search.length)
            self._end_at(found)

    def _add(self, piece: str) -> list[int]:
        self._pieces.append(piece)
        return self._search.push(piece)

    def _end_at(self, found: Sequence[int]) -> None:
        """Ends the text where the first of these stop strings begins."""
        if found:
            self._pieces, self.num_kept = [self.text[: min(found)]], self.num_read


class _StopSearch:
    """Finds stop strings in a text that comes in pieces, and looks at each character about once.

    length: of the text so far.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.length = 0
        self._stops = stops
        self._most_kept = max((len(stop) - 1 for stop in stops), default=0)
        self._end = ""  # of the text: where a stop string may have begun

    def push(self, piece: str) -> list[int]:
        """Where stop strings begin that this piece completes, one offset for each stop string at most."""
        window = self._end + piece
        self.length += len(piece)
        begin = self.length - len(window)
        self._end = window[max(0, len(window) - self._most_kept) :]
        return [begin + at for at in (window.find(stop) for stop in self._stops) if at >= 0]


class _MarkedText:
    """A row's text with its special tokens: where each token ends in it, and in the text without them."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._search = _StopSearch(stops)
        self._decoder = tokenizer.stream(prompt, skip_special_tokens=False)
        self._ends = [0]
        self._plain_ends = [0]

    def push(self, token: int, plain_length: int) -> list[int]:
        """One more token, after which the text without special tokens has `plain_length` characters.

        Gives where stop strings begin that it completes, as numbers of characters of the text without special tokens.
        """
        return self._add(self._decoder.push([token]), plain_length)

    def flush(self, plain_length: int) -> list[int]:
        return self._add(self._decoder.flush(), plain_length)

    def _add(self, piece: str, plain_length: int) -> list[int]:
        found = self._search.push(piece)
        self._ends.append(self._search.length)
        self._plain_ends.append(plain_length)
        return [self._plain(at) for at in found]

    def _plain(self, at: int) -> int:
        """The offset in the text without special tokens; inside a special token, where that token was left out."""
        token = bisect_right(self._ends, at)  # the token whose text holds the offset
        from_end = self._plain_ends[token] - (self._ends[token] - at)
        return max(self._plain_ends[token - 1], from_end)
