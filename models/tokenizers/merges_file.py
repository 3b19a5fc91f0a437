"""Builds a tokenizer from GPT-2's `vocab.json` and `merges.txt`: byte-level BPE, as early OPT folders have it."""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from decodax.core.arguments import is_integer
from decodax.core.printable import printable
from decodax.models.checkpoints.model_files import MAX_JSON_BYTES, find_file, read_json_object
from decodax.models.tokenizers.added_tokens import named_tokens
from decodax.models.tokenizers.vocabulary import library_errors

MERGES = "merges.txt"
_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")  # others cut words in their own ways
_END_OF_TEXT = "<|endoftext|>"


def has_merges(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a folder has the two files, of the kind that is read.

    settings: of `tokenizer_config.json`; without a `tokenizer_class` the kind is GPT-2's.
    """
    is_known = (settings.get("tokenizer_class") or _CLASSES[0]) in _CLASSES
    return is_known and all(find_file(folder, name) is not None for name in ("vocab.json", MERGES))


def read_merges(folder: Path, settings: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer of the library for the two files, and GPT-2's end token by role where no file names others.

    settings: of `tokenizer_config.json`, which may ask for a space before a text.
    Raises ValueError, naming the file, for one that is damaged.
    """
    path = folder / "vocab.json"
    vocabulary = read_json_object(path)
    ids = list(vocabulary.values())
    if not all(is_integer(token_id) for token_id in ids) or sorted(ids) != list(range(len(ids))):
        raise ValueError(f"{printable(path)} must give every token an id, from 0 to {len(ids) - 1}, each once")
    merges = _pairs(folder / MERGES, vocabulary)
    with library_errors(f"{printable(path)} is no vocabulary that can be used"):
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space") is True)
    backend.decoder = decoders.ByteLevel()
    if _END_OF_TEXT not in vocabulary or named_tokens(folder):
        return backend, {}
    backend.add_tokens([AddedToken(_END_OF_TEXT, normalized=False, special=True)])
    return backend, dict.fromkeys(("bos_token", "eos_token"), _END_OF_TEXT)


def _pairs(path: Path, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The merges, one a line after a line with the version."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{printable(path)} must have at most {MAX_JSON_BYTES:,} bytes")
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{printable(path)} must be UTF-8: {error}") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise ValueError(
                f"{printable(path)}, line {number}: two tokens of vocab.json that make a third are expected, got "
                f"{printable(repr(line[:80]))}"
            )
        pairs.append((left, right))
    return pairs
