"""Detokenises ids as they arrive: emits text as soon as it is certain, and never half a character."""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

_REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not (yet) a character
_MAX_UNFINISHED = 3  # bytes of a character that lacks its last one, so at most 3 U+FFFD
_CONTEXT_TOKENS = 8  # decoded again with each push: a decoder may treat the first token of a text differently


@runtime_checkable
class Vocabulary(Protocol):
    """The methods of a tokenizer that a stream needs."""

    def token_texts(self, tokens: Iterable[int], *, skip_special_tokens: bool = True) -> list[str]:
        """The vocabulary's texts of these ids."""
        ...

    def join(self, token_texts: Sequence[str]) -> str:
        """The joined text of these vocabulary entries."""
        ...


class StreamDecoder:
    """Streams text: the pushed pieces and the flushed rest are `decode` of all ids less `decode` of the prompt.

    If the prompt ends inside a character, the character belongs to the tokens that complete it. Text that ends in an
    unfinished character is held back until its last byte has come. Mutable: one per row of output.
    """

    def __init__(self, tokenizer: Vocabulary, *, prompt: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # The vocabulary's texts of the last ids, without special tokens that are left out.
        self._window = self._end_of(prompt)
        self._window_limit = 2 * max(_CONTEXT_TOKENS, len(self._window))
        self._seen = tokenizer.join(self._window)  # the window's text that is the prompt's or was emitted

    def push(self, tokens: Iterable[int]) -> str:
        """The text that these further ids complete."""
        further = self._tokenizer.token_texts(tokens, skip_special_tokens=self._skip_special_tokens)
        if not further:
            return ""
        self._window += further
        text = self._tokenizer.join(self._window)
        num_unfinished = min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_UNFINISHED)
        piece = self._emit(text[: len(text) - num_unfinished])
        if len(self._window) > self._window_limit:
            self._forget(text)
        return piece

    def flush(self) -> str:
        """The text that was held back: an unfinished character, as U+FFFD. Nothing may be pushed afterwards."""
        return self._emit(self._tokenizer.join(self._window))

    def _emit(self, certain: str) -> str:
        """The new text in the window's certain text. Only an unfinished character at a prompt's end can differ."""
        pairs = enumerate(zip(self._seen, certain, strict=False))
        num_seen = next((index for index, (one, other) in pairs if one != other), min(len(self._seen), len(certain)))
        piece = certain[num_seen:]
        if piece:
            self._seen = certain
        return piece

    def _end_of(self, tokens: Sequence[int]) -> list[str]:
        """The texts of the last few ids, or of more if they decode to too little."""
        num_tokens = _CONTEXT_TOKENS
        while True:
            last = self._tokenizer.token_texts(tokens[-num_tokens:], skip_special_tokens=self._skip_special_tokens)
            if self._is_context(last) or num_tokens >= len(tokens):
                return last
            num_tokens *= 2

    def _is_context(self, token_texts: Sequence[str]) -> bool:
        """Whether tokens after these decode as they do after all tokens before.

        A text may lose its first space, and one that starts inside a character loses that character. A complete
        character, or more U+FFFD than an unfinished one gives, means that something precedes the unfinished one; and
        UTF-8 itself shows where the next character begins.
        """
        text = self._tokenizer.join(token_texts)
        return text.rstrip(_REPLACEMENT) != "" or len(text) > _MAX_UNFINISHED

    def _forget(self, text: str) -> None:
        """Keeps only the window's last few texts, or those that are not empty; if neither will do, waits until the
        window has doubled."""
        last = self._window[-_CONTEXT_TOKENS:]
        num_unseen = len(text) - len(self._seen)
        if num_unseen < 0 or not self._is_context(last):
            shown = [token_text for token_text in self._window if token_text]
            if self._tokenizer.join(shown) == text:  # empty texts show nothing, so any number of them may go
                self._window = shown
            self._window_limit = 2 * max(_CONTEXT_TOKENS, len(self._window))
            return
        kept = self._tokenizer.join(last)
        self._window, self._seen = last, kept[: len(kept) - num_unseen]
        self._window_limit = 2 * _CONTEXT_TOKENS
