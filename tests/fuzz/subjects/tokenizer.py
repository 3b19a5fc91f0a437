"""Damages tokenizer.json and the files beside it: texts are encoded and ids decoded, or the files are refused.

Most damage of a tokenizer gives another valid tokenizer, so it only has to work: every text is encoded and every id
decoded without an error, and a stream of tokens gives the text of all of them.
"""

import json
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from decodax.models.tokenizers.tokenizer import StreamDecoder, Tokenizer
from tests.fuzz.damage import Allowed, Damage, Json, byte_damages, text_damages, tree_damages
from tests.fuzz.verdict import Case, WrongResult

_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_MOST_STREAMED = 1_000  # ids of a text: a damaged tokenizer may make many of a few characters
_TEXTS = ("", "the cat", "a  b\n\tc", "Zürich 안녕 😀", "<s>the</s> </s>", "\x00\x1b[2J", "é" * 50)
_BESIDE: dict[str, Json] = {
    _SETTINGS: {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True},
        "added_tokens_decoder": {"1": {"content": "<s>", "special": True}, "2": {"content": "</s>", "special": True}},
        "additional_special_tokens": ["<extra>"],
        "chat_template": "{{ messages }}",
        "model_max_length": 1000,
    },
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"},
    "added_tokens.json": {"<extra>": 267},  # the next id of the vocabulary that falls back to bytes
}


def _words() -> tokenizers.Tokenizer:
    names = ["<unk>", "<s>", "</s>", "the", "cat", "a", "b", "c"]
    made = tokenizers.Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def _bytes() -> tokenizers.Tokenizer:
    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    vocabulary = {name: index for index, name in enumerate(names)}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def _byte_fallback() -> tokenizers.Tokenizer:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "t", "h", "e", "th", "the"]
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = [("t", "h"), ("th", "e")]
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def _unigram() -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁the", -1.0), ("▁", -2.0), ("c", -3.0), ("at", -2.5)]
    made = tokenizers.Tokenizer(models.Unigram(pieces, 0, False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made


_BASES = {"words": _words, "bytes": _bytes, "byte_fallback": _byte_fallback, "unigram": _unigram}


@cache
def _files(base: str) -> dict[str, bytes]:
    made = _BASES[base]()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    beside = {name: json.dumps(content).encode() for name, content in _BESIDE.items()}
    return {_FILE: json.dumps(json.loads(made.to_str())).encode()} | beside


def cases(work: Path) -> Iterator[Case]:
    for base in _BASES:
        yield _case(work, base, _FILE, Damage("undamaged", _files(base)[_FILE], Allowed.HARMLESS))
        for name in (_FILE, *_BESIDE) if base == "byte_fallback" else (_FILE,):
            content = _files(base)[name]
            for damage in (*tree_damages(json.loads(content)), *text_damages(content)):
                yield _case(work, base, name, damage)
            for damage in byte_damages(content, range(90)):
                yield _case(work, base, name, damage)


def _case(work: Path, base: str, name: str, damage: Damage) -> Case:
    content = damage.content if isinstance(damage.content, bytes) else json.dumps(damage.content).encode()
    act = partial(_use, work, base, name, content, damage.allowed)
    return Case(f"tokenizer/{base}/{name} {damage.kind}", act, ((name, _FILE),), given=content)


def _read_at_all(name: str) -> dict[str, bytes]:
    """Whether a file is read: added_tokens.json only without added_tokens_decoder in the settings."""
    settings = {key: value for key, value in _BESIDE[_SETTINGS].items() if key != "added_tokens_decoder"}
    return {_SETTINGS: json.dumps(settings).encode()} if name == "added_tokens.json" else {}


def _use(work: Path, base: str, name: str, content: bytes, allowed: Allowed) -> None:
    folder = work / "tokenizer" / base
    folder.mkdir(parents=True, exist_ok=True)
    for file, right in (_files(base) | _read_at_all(name) | {name: content}).items():
        (folder / file).write_bytes(right)
    loaded = Tokenizer.from_folder(folder)
    if loaded is None:
        raise WrongResult("no tokenizer, though there is a file")
    if allowed is Allowed.NOTHING:
        raise WrongResult("loaded, and should have been refused")
    for text in _TEXTS:
        ids = loaded.encode(text)
        if not all(type(token) is int and token >= 0 for token in ids):
            raise WrongResult(f"{text!r} is encoded as {ids}")
        _check_stream(loaded, ids[:_MOST_STREAMED])
    loaded.decode([*range(min(loaded.vocab_size, 300)), 10**6])
    if allowed is Allowed.HARMLESS and base in ("bytes", "byte_fallback"):
        for text in ("the cat", "Zürich 안녕 😀"):
            if loaded.decode(loaded.encode(text)) != text:
                raise WrongResult(f"{text!r} comes back as {loaded.decode(loaded.encode(text))!r}")


def _check_stream(loaded: Tokenizer, ids: list[int]) -> None:
    decoder = StreamDecoder(loaded)
    streamed: Any = "".join(decoder.push([token]) for token in ids) + decoder.flush()
    if streamed != (whole := loaded.decode(ids)):
        raise WrongResult(f"{ids[:20]} streams as {streamed[:60]!r} and decodes as {whole[:60]!r}")
