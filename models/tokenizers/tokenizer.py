"""Converts text to token ids and back, with the `tokenizers` library and the files of a Hugging Face folder."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from decodax.core.printable import printable
from decodax.models.checkpoints.model_files import find_file, parse_json_object, read_json_bytes
from decodax.models.tokenizers.added_tokens import add_tokens, check_ids, read_settings
from decodax.models.tokenizers.stream_decoder import StreamDecoder

# Vocabularies that other libraries read; transformers turns each of them into a tokenizer.json.
_OTHER_FORMATS = (
    *("tokenizer.model", "tekken.json", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt"),
    *("vocab.txt", "qwen.tiktoken", "tiktoken.model"),
)
_BYTE_TOKENS = {f"<0x{value:{form}}>": value for value in range(256) for form in ("02X", "02x")}


class Tokenizer:
    """The tokenizer of a model folder's `tokenizer.json`, with the start and end tokens that its models expect."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        source: str = "the tokenizer",
    ) -> None:
        """Wraps a tokenizer of the library.

        backend: of the `tokenizers` library.
        prefix, suffix: ids that `encode` puts around every text, besides those of the post-processor.
        source: its name in error messages.
        """
        self.backend = backend
        self._prefix = list(prefix)
        self._suffix = list(suffix)
        self._source = source
        # Since 0.23 the library has normalized ones under another name ("▁</s>"), and does not skip them.
        self.special_tokens = {
            token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        }
        self._decoder = backend.decoder
        self._has_byte_tokens = _joins_byte_tokens(self._decoder)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer | None":
        """The tokenizer of a model folder, None if it has no `tokenizer.json`.

        Tokens that only the files beside it add are added, as transformers 5 does. The ids around a text are those of
        the file's post-processor. If it adds none, `add_bos_token` and `add_eos_token` of `tokenizer_config.json` are
        followed.
        Raises ValueError if `tokenizer.json` is unreadable.
        """
        path = find_file(folder, "tokenizer.json")
        if path is None:
            return None
        backend = _read_backend(path)
        add_tokens(backend, folder)
        backend.no_truncation()
        backend.no_padding()
        prefix, suffix = [], []
        if backend.num_special_tokens_to_add(is_pair=False) == 0:
            settings = read_settings(folder, "special_tokens_map.json") | read_settings(folder, "tokenizer_config.json")
            prefix = _special_token(backend, settings, "bos_token") if settings.get("add_bos_token") else []
            suffix = _special_token(backend, settings, "eos_token") if settings.get("add_eos_token") else []
        return cls(backend, prefix=prefix, suffix=suffix, source=printable(path))

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; a model's own vocabulary may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text, by default with the start and end tokens that the model was trained with."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text must be Unicode, but its character {error.start} is half of one (a lone surrogate, "
                f"{printable(text[error.start])})"
            ) from None
        with _library_errors(f"{self._source} cannot encode the text"):
            tokens = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return [*self._prefix, *tokens, *self._suffix] if add_special_tokens else tokens

    def decode(self, tokens: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of these ids; bytes that form no character become U+FFFD, ids that no token has are left out."""
        return self.join(self.token_texts(tokens, skip_special_tokens=skip_special_tokens))

    def stream(self, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for the ids that follow a prompt's, as they arrive."""
        return StreamDecoder(self, prompt=prompt, skip_special_tokens=skip_special_tokens)

    def token_texts(self, tokens: Iterable[int], *, skip_special_tokens: bool = True) -> list[str]:
        """The vocabulary's texts of these ids, from which `join` makes the text."""
        texts = (self._token_text(int(token), skip_special_tokens) for token in tokens)
        return [text for text in texts if text is not None]

    def _token_text(self, token: int, skip_special_tokens: bool) -> str | None:
        if token in self.special_tokens:
            return None if skip_special_tokens else self.special_tokens[token]
        return self.backend.id_to_token(token) if 0 <= token < 2**32 else None

    def join(self, token_texts: Sequence[str]) -> str:
        """The text of these vocabulary entries.

        With byte fallback (Llama 1 and 2, Mistral, Gemma) each character is decoded separately: the library would turn
        all consecutive bytes into U+FFFD as soon as one of them is wrong. So the text of the first tokens is the start
        of the text of all, except for an unfinished character at their end.
        """
        if self._decoder is None:
            return " ".join(token_texts)
        with _library_errors(f"{self._source} cannot decode tokens"):
            return self._decoder.decode(
                _between_characters(token_texts) if self._has_byte_tokens else list(token_texts)
            )


def no_tokenizer_message(folder: Path, instead: str) -> str:
    """The error message when text needs a tokenizer that a folder lacks; `instead` is what works without one."""
    others = [name for name in _OTHER_FORMATS if (folder / name).is_file()]
    if not others:
        return f"{folder} has no tokenizer.json: {instead}"
    return (
        f"{folder} has no tokenizer.json, only {' and '.join(others)}, which is not read: convert it once, with "
        f"transformers.AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}), or {instead}"
    )


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    """The library's tokenizer, after checking that the file is JSON with ids that the library keeps."""
    content = read_json_bytes(path)
    described = parse_json_object(content, str(path))
    with _library_errors(f"{printable(path)} is no tokenizer that the tokenizers library reads"):
        backend = tokenizers.Tokenizer.from_buffer(content.removeprefix(b"\xef\xbb\xbf"))
    check_ids(
        backend, ((token["content"], token["id"]) for token in described.get("added_tokens", ())), printable(path)
    )
    return backend


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Turns what the library raises into a ValueError: plain Exceptions, and panics, which are BaseExceptions."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{what}: {printable(error)}") from error
        raise


def _joins_byte_tokens(decoder: Any) -> bool:
    """Whether a decoder joins byte tokens into characters, and an empty token between them changes nothing."""
    if decoder is None:
        return False
    try:
        with _library_errors("the decoder"):
            texts = [decoder.decode(["a", "<0x62>", *between, "<0x63>"]) for between in ([], [""])]
    except ValueError:  # a decoder that cannot decode raises when it is used
        return False
    return all(text.endswith("bc") for text in texts)


def _between_characters(token_texts: Sequence[str]) -> list[str]:
    """The same texts with an empty token before each character (or wrong byte) made of byte tokens."""
    values = [_BYTE_TOKENS.get(text, -1) for text in token_texts]
    separated, index = [], 0
    while index < len(values):
        length = 1
        if values[index] >= 0:
            separated.append("")
            length = _character_length(values[index : index + 4])
        separated += token_texts[index : index + length]
        index += length
    return separated


def _character_length(values: Sequence[int]) -> int:
    """The length in bytes of the character that these bytes start with; 1 if they start with none."""
    lead = values[0]
    length = 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    try:
        bytes(values[:length]).decode("utf-8")
    except ValueError:  # no UTF-8, or not only bytes
        return 1
    return length


def _special_token(backend: tokenizers.Tokenizer, settings: dict[str, Any], name: str) -> list[int]:
    """The id of a special token, given as its text or as an object with its text under "content"; empty if unknown."""
    token = settings.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    token_id = backend.token_to_id(text) if isinstance(text, str) else None
    return [] if token_id is None else [token_id]
