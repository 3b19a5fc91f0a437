"""Builds a tokenizer from the key-values of a GGUF file (`tokenizer.ggml.*`).

`tokenizer.ggml.model` is "llama" for sentencepiece's BPE with scores, "gemma4" for the same pieces with merges, and
"gpt2" for byte-level BPE with merges, whose `tokenizer.ggml.pre` names the pre-tokenizer; other kinds of vocabulary are
refused by name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from decodax.core.arguments import is_integer, is_number, listed, plain
from decodax.core.printable import printable
from decodax.models.tokenizers.gguf_pre_tokenizers import PRE_TOKENIZERS, NamedPreTokenizer
from decodax.models.tokenizers.sentencepiece_file import Algorithm, Piece, PieceKind, SentencepieceModel
from decodax.models.tokenizers.sentencepiece_vocabulary import SPACE, build_backend
from decodax.models.tokenizers.vocabulary import add_markers, refuse_repeated

_KEY = "tokenizer.ggml."
_IDS = {"bos_token": 1, "eos_token": 2}  # of a sentencepiece vocabulary, where the file does not say
_SPECIAL = (PieceKind.CONTROL, PieceKind.UNKNOWN)


def build_tokenizer(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of the library that these key-values describe; it adds start and end tokens as they say.

    metadata: `tokenizer.ggml.model`, `.pre`, `.tokens`, `.token_type`, `.scores`, `.merges`, `.bos_token_id`,
        `.eos_token_id`, `.add_bos_token`, `.add_eos_token`, `.add_space_prefix`; other keys are not read.
    Raises ValueError, with the key, for values that are missing or wrong, and for kinds that are not known.
    """
    kind = _value(metadata, "model", str, "the kind of vocabulary, a text")
    is_bos_usual = True
    if kind == "llama":
        backend = _sentencepiece(metadata)
    elif kind == "gemma4":
        backend = _merged_pieces(metadata)
    elif kind == "gpt2":
        cuts = _pre_tokenizer(metadata)
        backend, is_bos_usual = _byte_level(metadata, cuts), cuts.add_bos
    else:
        raise ValueError(
            f"{_KEY}model must be llama or gemma4 (sentencepiece) or gpt2 (byte-level BPE), got {printable(kind)}: "
            "use the model's own folder with tokenizer.json instead"
        )
    tokens = named_tokens(metadata)
    add_bos = _value(metadata, "add_bos_token", bool, "true or false", default=is_bos_usual)
    add_eos = _value(metadata, "add_eos_token", bool, "true or false", default=False)
    bos, eos = tokens.get("bos_token") if add_bos else None, tokens.get("eos_token") if add_eos else None
    add_markers(backend, bos, eos)
    return backend


def named_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the tokens with a role (`bos_token`, `eos_token`, `unk_token`, `pad_token`), by role."""
    tokens = _texts(metadata, "tokens")
    usual = _IDS if metadata.get(f"{_KEY}model") == "llama" else {}
    keys = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id"}
    keys["pad_token"] = "padding_token_id"
    found = {}
    for role, key in keys.items():
        token_id = plain(metadata.get(_KEY + key, usual.get(role)))
        if token_id is None:
            continue
        if not is_integer(token_id) or not 0 <= token_id < len(tokens):
            raise ValueError(f"{_KEY}{key} must be a token id in 0..{len(tokens) - 1}, got {printable(repr(token_id))}")
        found[role] = tokens[token_id]
    return found


def gguf_chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name: `tokenizer.chat_template` is "default", `tokenizer.chat_template.x` is x."""
    usual, start = "tokenizer.chat_template", "tokenizer.chat_template."
    templates = {"default": metadata[usual]} if usual in metadata else {}
    templates |= {key.removeprefix(start): text for key, text in metadata.items() if key.startswith(start)}
    for name, text in templates.items():
        if not isinstance(text, str):
            raise ValueError(f"the chat template {printable(name)} must be a text, got {printable(repr(text))}")
    return templates


def _sentencepiece(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    tokens = _texts(metadata, "tokens")
    scores = listed(metadata.get(f"{_KEY}scores"))
    if scores is None or len(scores) != len(tokens) or not all(map(is_number, scores)):
        raise ValueError(f"{_KEY}scores must have a number for each of the {len(tokens)} tokens")
    kinds = _kinds(metadata, tokens)
    unknown = kinds.index(PieceKind.UNKNOWN) if PieceKind.UNKNOWN in kinds else None
    # Some files mark unused places as unknown, too: no text is cut into them.
    kinds = [
        PieceKind.UNUSED if kind is PieceKind.UNKNOWN and index != unknown else kind for index, kind in enumerate(kinds)
    ]
    # User-defined pieces have spaces in these files, where sentencepiece's own have what stands for a space.
    spelt = [
        token.replace(" ", SPACE) if kind is PieceKind.USER_DEFINED else token
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    pieces = tuple(map(Piece, spelt, (float(score) for score in scores), kinds))
    has_prefix = _value(metadata, "add_space_prefix", bool, "true or false", default=True)
    model = SentencepieceModel(
        pieces,
        Algorithm.BPE,
        byte_fallback=any(kind is PieceKind.BYTE for kind in kinds),
        add_dummy_prefix=has_prefix,
        remove_extra_whitespaces=False,
    )
    return build_backend(model)


def _merged_pieces(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    tokens, kinds, vocabulary = _vocabulary(metadata)
    unknown = [token for token, kind in zip(tokens, kinds, strict=True) if kind is PieceKind.UNKNOWN]
    unk = named_tokens(metadata).get("unk_token", unknown[0] if unknown else None)
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, _merges(metadata, vocabulary), unk_token=unk, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    _add_special(backend, tokens, kinds)
    return backend


def _pre_tokenizer(metadata: Mapping[str, Any]) -> NamedPreTokenizer:
    name = _value(metadata, "pre", str, "a name of a pre-tokenizer", default="default")
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            f"{_KEY}pre must be one of {', '.join(PRE_TOKENIZERS)}, got {printable(name)}: use the model's own "
            "folder with tokenizer.json instead"
        )
    return PRE_TOKENIZERS[name]


def _byte_level(metadata: Mapping[str, Any], cuts: NamedPreTokenizer) -> tokenizers.Tokenizer:
    tokens, kinds, vocabulary = _vocabulary(metadata)
    merges = _merges(metadata, vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cuts.whole_words))
    if cuts.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cuts.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    _add_special(backend, tokens, kinds)
    return backend


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], list[PieceKind], dict[str, int]]:
    tokens = _texts(metadata, "tokens")
    refuse_repeated(tokens)
    return tokens, _kinds(metadata, tokens), {token: index for index, token in enumerate(tokens)}


def _add_special(backend: tokenizers.Tokenizer, tokens: list[str], kinds: list[PieceKind]) -> None:
    added = [
        AddedToken(token, normalized=False, special=kind in _SPECIAL)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (*_SPECIAL, PieceKind.USER_DEFINED) and token
    ]
    backend.add_tokens(added)


def _merges(metadata: Mapping[str, Any], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    merges = [_pair(text) for text in _texts(metadata, "merges")]
    absent = next((text for pair in merges for text in (*pair, "".join(pair)) if text not in vocabulary), None)
    if absent is not None:
        raise ValueError(
            f"{_KEY}merges must merge tokens into tokens, got {printable(repr(absent))}, which is none of the "
            f"{len(vocabulary)} in {_KEY}tokens"
        )
    return merges


def _pair(text: str) -> tuple[str, str]:
    left, space, right = text[1:].partition(" ")  # a first character cannot be the space between two tokens
    if not space or not right:
        raise ValueError(f"{_KEY}merges must hold two tokens with a space between, got {printable(repr(text))}")
    return text[:1] + left, right


def _kinds(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[PieceKind]:
    """What each token is; where the file does not say, those with a role are control tokens."""
    values = metadata.get(f"{_KEY}token_type")
    if values is None:
        named = {text: role for role, text in named_tokens(metadata).items()}
        roles = {"unk_token": PieceKind.UNKNOWN}
        return [roles.get(named[token], PieceKind.CONTROL) if token in named else PieceKind.NORMAL for token in tokens]
    kinds = listed(values)
    known = {int(kind): kind for kind in PieceKind} | {0: PieceKind.NORMAL}
    if kinds is None or len(kinds) != len(tokens) or not all(is_integer(kind) and kind in known for kind in kinds):
        raise ValueError(f"{_KEY}token_type must have a number in 0..6 for each of the {len(tokens)} tokens")
    return [known[int(kind)] for kind in kinds]


def _texts(metadata: Mapping[str, Any], name: str) -> list[str]:
    texts = listed(metadata.get(_KEY + name))
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{_KEY}{name} must be a list of texts, got {printable(repr(metadata.get(_KEY + name))[:80])}")
    return texts


def _value(metadata: Mapping[str, Any], name: str, kind: type, expected: str, default: Any = None) -> Any:
    value = plain(metadata.get(_KEY + name, default))
    if not isinstance(value, kind):
        raise ValueError(f"{_KEY}{name} must be {expected}, got {printable(repr(value))}")
    return value
