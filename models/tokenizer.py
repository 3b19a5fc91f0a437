"""Text to token ids and back, by the `tokenizers` library and the files of a Hugging Face folder.

Also decodes streams: `StreamDecoder` hands out text as tokens arrive, and never half a character.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

_REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not (yet) a character
_MAX_CHARACTER_BYTES = 4  # in UTF-8, so at most as many tokens
_CONTEXT_TOKENS = 8  # decoded again with each push, so that the decoder sees what stood before the new tokens


class Tokenizer:
    """What a model folder's `tokenizer.json` describes, with the start and end tokens that its models expect."""

    def __init__(
        self, backend: tokenizers.Tokenizer, *, prefix: Sequence[int] = (), suffix: Sequence[int] = ()
    ) -> None:
        """`prefix` and `suffix` are ids that `encode` puts around every text, beside those of the post-processor."""
        self.backend = backend
        self._prefix = list(prefix)
        self._suffix = list(suffix)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer | None":
        """The tokenizer of a model folder, None when it has no `tokenizer.json`; ValueError when that is unreadable.

        The ids around a text are those of the file's post-processor. Where it adds none, `add_bos_token` and
        `add_eos_token` of `tokenizer_config.json` are followed, which transformers 4 did and 5 does not.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path} is no tokenizer that the tokenizers library reads: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        prefix, suffix = [], []
        if backend.num_special_tokens_to_add(is_pair=False) == 0:
            settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
            prefix = _special_token(backend, settings, "bos_token") if settings.get("add_bos_token") else []
            suffix = _special_token(backend, settings, "eos_token") if settings.get("add_eos_token") else []
        return cls(backend, prefix=prefix, suffix=suffix)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; a model's own vocabulary may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, by default with the start and end tokens that the model was trained with."""
        tokens = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return [*self._prefix, *tokens, *self._suffix] if add_special_tokens else tokens

    def decode(self, tokens: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of these ids; bytes that form no character become U+FFFD."""
        return self.backend.decode([int(token) for token in tokens], skip_special_tokens=skip_special_tokens)


class StreamDecoder:
    """Decodes ids as they arrive: the pushed pieces and the flushed rest together are `decode` of all of them.

    Text that ends in an unfinished character is held back until its last byte has come. Mutable: one per row of output.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the ids not yet done with, after a few that give the decoder their context
        self._emitted = 0  # characters of the window's text that have been handed out

    def push(self, tokens: Iterable[int]) -> str:
        """The text that these further ids complete."""
        self._window += [int(token) for token in tokens]
        text = self._tokenizer.decode(self._window)
        # One unfinished character can turn all bytes before it into U+FFFD (byte fallback), so all of them wait.
        whole = text.rstrip(_REPLACEMENT)
        piece = whole[self._emitted :]
        self._emitted = max(self._emitted, len(whole))
        if whole == text and len(self._window) > 2 * _CONTEXT_TOKENS:
            self._forget()
        return piece

    def _forget(self) -> None:
        """Keeps only the last few ids, from the start of a character on.

        They must decode to something: a decoder may drop the first space, and behind special tokens it would be a
        real one.
        """
        for num_kept in range(_CONTEXT_TOKENS, _CONTEXT_TOKENS + _MAX_CHARACTER_BYTES):
            context = self._tokenizer.decode(self._window[-num_kept:])
            if context and _REPLACEMENT not in context:
                self._window, self._emitted = self._window[-num_kept:], len(context)
                return

    def flush(self) -> str:
        """What was held back: an unfinished character, as U+FFFD. Nothing may be pushed afterwards."""
        return self._tokenizer.decode(self._window)[self._emitted :]


def read_end_token_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end a text: `eos_token_id` (one or several) of `generation_config.json`, else of `config.json`."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in values):
            raise ValueError(f"eos_token_id in {folder / name} must be a token id or a list of them, got {value!r}")
        if values:
            return tuple(values)
    return ()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def _special_token(backend: tokenizers.Tokenizer, settings: dict[str, Any], name: str) -> list[int]:
    """The id of a special token, given as its text or as an object with its text under "content"; none if unknown."""
    token = settings.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    token_id = backend.token_to_id(text) if isinstance(text, str) else None
    return [] if token_id is None else [token_id]
