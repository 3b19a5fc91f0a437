"""Reads the vocabulary of a model folder: `tokenizer.json`, `tokenizer.model`, `tekken.json`, or GPT-2's two files."""

from dataclasses import dataclass
from pathlib import Path

import tokenizers

from decodax.core.printable import printable
from decodax.models.checkpoints.model_files import find_file, parse_json_object, read_json_bytes
from decodax.models.tokenizers.added_tokens import add_tokens, check_ids, named_tokens, read_settings
from decodax.models.tokenizers.merges_file import has_merges, read_merges
from decodax.models.tokenizers.sentencepiece_file import PieceKind, read_sentencepiece
from decodax.models.tokenizers.sentencepiece_vocabulary import build_backend
from decodax.models.tokenizers.tekken_file import BOS, EOS, read_tekken
from decodax.models.tokenizers.vocabulary import add_markers, library_errors

# Vocabularies that other libraries read; transformers turns each of them into a tokenizer.json.
_OTHER_FORMATS = (
    *("spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt", "vocab.txt", "qwen.tiktoken"),
    "tiktoken.model",
)


@dataclass(frozen=True)
class FolderVocabulary:
    """What the files of a model folder say about its tokens.

    backend: the tokenizer of the library; it adds the start and end tokens, if the file says which.
    path: the file with the vocabulary.
    named: the texts of the tokens with a role, by role ("bos_token").
    """

    backend: tokenizers.Tokenizer
    path: Path
    named: dict[str, str]


def read_vocabulary(folder: Path) -> FolderVocabulary | None:
    """The vocabulary of a model folder with all added tokens, None if it has no file that is read.

    Without `add_bos_token` in `tokenizer_config.json` a sentencepiece or tekken vocabulary begins a text with the start
    token, as the libraries of those formats and llama.cpp do (transformers 5 does not).
    Raises ValueError, naming the file, for one that is damaged.
    """
    path = find_file(folder, "tokenizer.json")
    if path is not None:
        backend = _tokenizer_json(path)
        add_tokens(backend, folder)
        return FolderVocabulary(backend, path, named_tokens(folder))
    settings = read_settings(folder, "tokenizer_config.json")
    path = find_file(folder, "tokenizer.model")
    if path is None and has_merges(folder, settings):
        backend, named = read_merges(folder, settings)
        add_tokens(backend, folder)
        return FolderVocabulary(backend, folder / "vocab.json", named | named_tokens(folder))
    if path is not None:
        backend, named = _sentencepiece(path, is_legacy=settings.get("legacy") is not False)
    else:
        path = find_file(folder, "tekken.json")
        if path is None:
            return None
        backend, named = read_tekken(path), {"bos_token": BOS, "eos_token": EOS}
    add_tokens(backend, folder)
    named |= named_tokens(folder)
    bos = named.get("bos_token") if settings.get("add_bos_token", True) else None
    eos = named.get("eos_token") if settings.get("add_eos_token") else None
    add_markers(backend, bos, eos)
    return FolderVocabulary(backend, path, named)


def no_tokenizer_message(folder: Path, instead: str) -> str:
    """The error message when text needs a tokenizer that a folder lacks; `instead` is what works without one."""
    others = [name for name in _OTHER_FORMATS if (folder / name).is_file()]
    if not others:
        return f"{folder} has no tokenizer.json: {instead}"
    return (
        f"{folder} has no tokenizer.json, only {' and '.join(others)}, which is not read: convert it once, with "
        f"transformers.AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}), or {instead}"
    )


def _tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """The library's tokenizer, after checking that the file is JSON with ids that the library keeps."""
    content = read_json_bytes(path)
    described = parse_json_object(content, str(path))
    with library_errors(f"{printable(path)} is no tokenizer that the tokenizers library reads"):
        backend = tokenizers.Tokenizer.from_buffer(content.removeprefix(b"\xef\xbb\xbf"))
    check_ids(
        backend, ((token["content"], token["id"]) for token in described.get("added_tokens", ())), printable(path)
    )
    backend.no_truncation()
    backend.no_padding()
    return backend


def _sentencepiece(path: Path, *, is_legacy: bool) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    model = read_sentencepiece(path)
    there = {piece.text: piece.kind for piece in model.pieces}
    unknown = [text for text, kind in there.items() if kind is PieceKind.UNKNOWN]
    roles = {"bos_token": model.bos, "eos_token": model.eos, "unk_token": unknown[0] if unknown else ""}
    with library_errors(f"{printable(path)} is no vocabulary that can be used"):
        backend = build_backend(model, prefix_every_chunk=is_legacy)
    return backend, {role: text for role, text in roles.items() if text in there}
