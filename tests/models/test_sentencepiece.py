"""A sentencepiece vocabulary encodes and decodes as sentencepiece does, and as transformers around special tokens."""

import itertools
import json
import struct
import unicodedata
import zlib
from pathlib import Path

import pytest

from decodax.models.tokenizers.sentencepiece_file import (
    Algorithm,
    Piece,
    PieceKind,
    SentencepieceModel,
    parse_sentencepiece,
    read_sentencepiece,
)
from decodax.models.tokenizers.sentencepiece_vocabulary import build_backend
from decodax.models.tokenizers.tokenizer import Tokenizer
from tests.many_scripts import texts

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text("utf-8"))
NAMES = sorted(path.stem for path in GOLDEN.glob("*.model"))


def checksums(entries):
    return [f"{zlib.crc32(str(entry).encode()) % 2**16:04x}" for entry in entries]


def expected(name, part="checksums"):
    """The checksums in the golden file: four digits for each text."""
    return [EXPECTED[name][part][place : place + 4] for place in range(0, 4_000, 4)]


@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_texts_are_encoded_and_decoded_as_by_sentencepiece(name):
    model = read_sentencepiece(GOLDEN / f"{name}.model")
    assert model.algorithm.name.lower() == name.split("_")[0] and model.byte_fallback == (name in WITH_BYTES)
    tokenizer = Tokenizer(build_backend(model))
    given = texts(look_alikes=False)
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in given]
    compared = [index for index, text in enumerate(given) if not (model.charsmap and has_mark_after_change(text))]
    assert len(compared) == 1_000 if not model.charsmap else len(compared) > 950
    found, right = checksums(rows), expected(name)
    assert [index for index in compared if found[index] != right[index]] == TIES.get(name, [])
    assert rows[: len(EXPECTED[name]["ids"])] == EXPECTED[name]["ids"]
    known = [index for index in compared if 0 not in rows[index]]  # sentencepiece writes unknown characters as U+2047
    assert len(known) > (990 if model.byte_fallback else 99)
    decoded, right = checksums([tokenizer.decode(row) for row in rows]), expected(name, "decoded")
    assert [decoded[index] for index in known] == [right[index] for index in known]


def has_mark_after_change(text):
    """Whether a combining mark follows a character that the vocabularies' rules replace: it is lost (a known bug)."""
    return any(
        unicodedata.category(mark).startswith("M") and (before in CHANGED or text[index - 1 : index + 1] == "e\u0301")
        for index, (before, mark) in enumerate(itertools.pairwise(text))
    )


TIES = {"unigram_bytes": [8]}  # 888718 in pieces of the same scores, as 88-8 or 8-88
CHANGED = "\uff21\uff46\ufb01\u00a0\t\u3000\u200b\u2460"


WITH_BYTES = ("bpe_bytes", "bpe_own_pieces", "unigram_bytes")


@pytest.mark.parametrize("is_legacy", [True, False])
def test_texts_with_special_tokens_are_those_of_transformers(tmp_path, is_legacy):
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "bpe_bytes.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": is_legacy}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer is not None
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts()]
    assert checksums(rows) == expected(f"bpe_bytes/legacy={is_legacy}")


@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [
        ({}, [1], []),
        ({"add_bos_token": True}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": True}, [1], [2]),
        ({"add_bos_token": False, "add_eos_token": True, "eos_token": "<unk>"}, [], [0]),
    ],
)
def test_a_folder_s_start_and_end_tokens(tmp_path, settings, before, after):
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "bpe_bytes.model").read_bytes())
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer is not None
    plain = tokenizer.encode("a b", add_special_tokens=False)
    assert tokenizer.encode("a b") == [*before, *plain, *after]
    assert tokenizer.encode("<s>a b")[: len(before) + 1] == [1, *plain[: len(before)]]
    assert tokenizer.decode([*before, *plain, *after]) == "a b"
    assert tokenizer.named_tokens == {
        "bos_token": "<s>",
        "eos_token": settings.get("eos_token", "</s>"),
        "unk_token": "<unk>",
    }


def test_added_tokens_beside_the_vocabulary_are_added(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "bpe_bytes.model").read_bytes())
    number = len(read_sentencepiece(GOLDEN / "bpe_bytes.model").pieces)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": number}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [number]
    assert tokenizer.vocab_size == number + 1
    tokenizer.check_vocabulary(number)  # an added token may lie beyond the model's vocabulary
    with pytest.raises(ValueError, match=rf"has {number} tokens, but the model's vocabulary has {number - 1} "):
        tokenizer.check_vocabulary(number - 1)


def test_tokenizer_json_comes_first(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"damaged")
    build_backend(read_sentencepiece(GOLDEN / "bpe_bytes.model")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer is not None and tokenizer.encode("a", add_special_tokens=False)


def field(number, content):
    """A field of bytes (or, of an int, of a number) as protocol buffers write it."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content % 2**64)
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(number):
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def piece(text, score=0.0, kind=1):
    return field(1, field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + field(3, kind))


UNKNOWN = piece("<unk>", 0, 2)


def test_fields_have_sentencepiece_s_defaults():
    assert parse_sentencepiece(UNKNOWN + field(1, field(1, "é".encode()))) == SentencepieceModel(
        (Piece("<unk>", 0.0, PieceKind.UNKNOWN), Piece("é"))
    )
    trainer = field(3, 2) + field(35, 1) + field(46, b"<bos>") + field(47, b"<eos>") + field(41, -1)
    rules = field(2, b"map") + field(3, 0) + field(4, 0) + field(5, 0)
    full = piece("a", -2.5, 4) + field(2, trainer) + field(3, rules) + field(99, b"?") + varint(98 << 3 | 1) + bytes(8)
    assert parse_sentencepiece(full) == SentencepieceModel(
        (Piece("a", -2.5, PieceKind.USER_DEFINED),),
        Algorithm.BPE,
        byte_fallback=True,
        bos="<bos>",
        eos="<eos>",
        charsmap=b"map",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        escape_whitespaces=False,
    )


GOOD = (GOLDEN / "bpe_bytes.model").read_bytes()
NOT = r"must be a vocabulary of sentencepiece .* and is not: "


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", NOT + "it holds no pieces; download"),
        (GOOD[:-7], NOT + "it ends within a field"),
        (GOOD[:40], NOT + "it ends within"),
        (b"IQ== 0\nIg== 1\n", NOT),  # tiktoken's format has this name, too
        (
            b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
            NOT + "it ends within a field of 9,223,372,036,854,775,80",
        ),
        (b"\xff" * 99, NOT + "byte 0 begins a number of more than 64 bits"),
        (b"\x0b", NOT + "byte 1 begins no field"),
        (UNKNOWN + b"\x08\x01", NOT + "a field has a number where bytes are expected"),
        (field(1, field(1, b"\xff")), NOT + ".*codec can't decode"),
        (piece("a", float("nan")), NOT + "a score is no number"),
        (piece("a", 0, 9), NOT + "9 is not a valid PieceKind"),
        (UNKNOWN + field(2, field(3, 3)), "the algorithm must be unigram or BPE, got word$"),
        (UNKNOWN + field(2, field(3, b"x")), NOT + "a field has bytes where a number is expected"),
        (UNKNOWN + field(2, field(24, 1)), r"spaces end words here \(treat_whitespace_as_suffix\)"),
        (UNKNOWN + field(5, field(2, b"x")), "a denormalizer_spec, .* is not supported"),
        (piece("a"), "no vocabulary that can be used: the vocabulary must have one unknown piece, got 0"),
        (UNKNOWN + UNKNOWN, "a vocabulary must have each token once, got '<unk>' twice"),
        (UNKNOWN + field(3, field(2, b"map")), "no vocabulary that can be used"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_absurd_size_is_not_read(tmp_path):
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(ValueError, match=r"has 67,108,865 bytes; a vocabulary of more than 67,108,864 is not read"):
        read_sentencepiece(path)
