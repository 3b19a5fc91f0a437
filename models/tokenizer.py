"""Text to token ids and back, by the `tokenizers` library and the files of a Hugging Face folder.

Also decodes streams: `StreamDecoder` hands out text as tokens arrive, and never half a character.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

_REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not (yet) a character
_CONTEXT_TOKENS = 8  # decoded again with each push, so that the decoder sees what stood before the new tokens


class Tokenizer:
    """What a model folder's `tokenizer.json` describes, with the start and end tokens that its models expect."""

    def __init__(self, backend: tokenizers.Tokenizer, *, prefix: Sequence[int], suffix: Sequence[int]) -> None:
        """`prefix` and `suffix` are the ids that `encode` puts around every text."""
        self.backend = backend
        self._prefix = list(prefix)
        self._suffix = list(suffix)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer | None":
        """The tokenizer of a model folder, None when it has no `tokenizer.json`; ValueError when that is unreadable.

        The ids around a text are those of the file's post-processor, unless `tokenizer_config.json` says otherwise with
        `add_bos_token` or `add_eos_token`.
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
        settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
        prefix, suffix = _around(backend)
        first, last = (_token_id(backend, settings.get(name)) for name in ("bos_token", "eos_token"))
        if first is not None and settings.get("add_bos_token") is not None:
            prefix = ([first] if settings["add_bos_token"] else []) + [token for token in prefix if token != first]
        if last is not None and settings.get("add_eos_token") is not None:
            suffix = [token for token in suffix if token != last] + ([last] if settings["add_eos_token"] else [])
        return cls(backend, prefix=prefix, suffix=suffix)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; a model's own vocabulary may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, by default with the start and end tokens that the model was trained with."""
        tokens = self.backend.encode(text, add_special_tokens=False).ids
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
        whole = text.rstrip(_REPLACEMENT)
        piece = whole[self._emitted :]
        self._emitted = max(self._emitted, len(whole))
        if whole == text and len(self._window) > 2 * _CONTEXT_TOKENS:
            # A context that decodes to nothing (special tokens) would be none: a decoder may drop its first space.
            context = self._window[-_CONTEXT_TOKENS:]
            if kept := self._tokenizer.decode(context):
                self._window, self._emitted = context, len(kept)
        return piece

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


def _around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the file's post-processor puts before and after a text."""
    probe = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    num_before = next((i for i in range(len(whole)) if whole[i : i + len(probe)] == probe), 0)
    return whole[:num_before], whole[num_before + len(probe) :]


def _token_id(backend: tokenizers.Tokenizer, token: Any) -> int | None:
    """The id of a special token, given as its text or as an object with its text under "content"."""
    text = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(text) if isinstance(text, str) else None
