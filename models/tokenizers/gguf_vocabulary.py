"""Builds a tokenizer from the key-values of a GGUF file: byte-level BPE, as GPT-2 and SmolLM have it."""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from decodax.core.printable import printable

_KEY = "tokenizer.ggml."
_CONTROL, _USER_DEFINED = 3, 4
_DIGITS_APART = {"smollm": True, "gpt-2": False, "gpt2": False}


def build_tokenizer(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer that a file's key-values describe, which adds the start and end tokens that they ask for.

    metadata: of the file.
    Raises ValueError for a vocabulary of another kind, and for a malformed one.
    """
    kind, pre = metadata.get(f"{_KEY}model"), metadata.get(f"{_KEY}pre", "gpt-2")
    if kind != "gpt2":
        raise ValueError(f"{_KEY}model must be gpt2 (byte-level BPE), got {printable(repr(kind))}")
    if not isinstance(pre, str) or pre not in _DIGITS_APART:
        raise ValueError(f"{_KEY}pre must be one of {', '.join(_DIGITS_APART)}, got {printable(repr(pre))}")
    tokens, merges = _texts(metadata, "tokens"), _texts(metadata, "merges")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    known = set(tokens)
    if wrong := next((pair for pair in pairs if len(pair) != 2 or not known.issuperset((*pair, "".join(pair)))), None):
        raise ValueError(
            f"{_KEY}merges must be pairs of tokens that make a token, got {printable(repr(' '.join(wrong)))}"
        )
    if len(known) != len(tokens):
        raise ValueError(f"{_KEY}tokens must be different, and {len(tokens) - len(known)} of them are not")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [(pair[0], pair[1]) for pair in pairs]))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    apart = [pre_tokenizers.Digits(individual_digits=True)] if _DIGITS_APART[pre] else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*apart, byte_level])  # pyright: ignore[reportArgumentType]
    backend.decoder = decoders.ByteLevel()
    types = metadata.get(f"{_KEY}token_type", [])
    for token, token_type in zip(tokens, types, strict=False):
        if token_type in (_CONTROL, _USER_DEFINED):
            backend.add_tokens([AddedToken(token, special=token_type == _CONTROL, normalized=False)])
    _add_ends(backend, metadata, tokens)
    return backend


def _texts(metadata: Mapping[str, Any], name: str) -> list[str]:
    texts = metadata.get(f"{_KEY}{name}")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{_KEY}{name} must be a list of texts")
    return texts


def _add_ends(backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], tokens: list[str]) -> None:
    """Lets the tokenizer put the start and end tokens around a text, if the file asks for it."""
    ends = {}
    for name in ("bos", "eos"):
        if metadata.get(f"{_KEY}add_{name}_token"):
            token = metadata.get(f"{_KEY}{name}_token_id")
            if type(token) is not int or not 0 <= token < len(tokens):
                raise ValueError(f"{_KEY}{name}_token_id must be in 0..{len(tokens) - 1}, got {printable(token)}")
            ends[name] = (tokens[token], token)
    if ends:
        template = [
            *[ends[name][0] for name in ("bos",) if name in ends],
            "$A",
            *[ends[n][0] for n in ("eos",) if n in ends],
        ]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(ends.values()))
