"""Reads a sentencepiece vocabulary (`tokenizer.model`): pieces with their scores, and how text is normalised.

The file is a protocol buffer message, ModelProto of sentencepiece's `sentencepiece_model.proto`. Of its fields only
those are read that change how text is encoded; values that this library cannot follow are refused by name.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from decodax.core.printable import printable

_MAX_BYTES = 2**26  # the largest published file, with 256,000 pieces, has 4 MB
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers


class PieceKind(IntEnum):
    """What a piece is; GGUF files use the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Algorithm(IntEnum):
    """How a text is cut into pieces."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHARACTER = 4


@dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary; its id is its place.

    text: with U+2581 for spaces.
    score: the larger, the earlier a pair is merged (BPE); a logarithm of a probability (unigram).
    kind: what it is.
    """

    text: str
    score: float = 0.0
    kind: PieceKind = PieceKind.NORMAL


@dataclass(frozen=True)
class SentencepieceModel:
    """A vocabulary and the rules of its normalisation, with sentencepiece's default values.

    pieces: the vocabulary.
    algorithm: how a text is cut.
    byte_fallback: bytes stand for characters that no piece has.
    bos, eos: texts of the pieces that begin and end a text, if the vocabulary has them.
    charsmap: replacements of characters, compiled by sentencepiece; empty for none.
    add_dummy_prefix: a space is put before a text.
    remove_extra_whitespaces: spaces at the ends are dropped, and several become one.
    escape_whitespaces: pieces have U+2581 for a space.
    """

    pieces: tuple[Piece, ...]
    algorithm: Algorithm = Algorithm.UNIGRAM
    byte_fallback: bool = False
    bos: str = "<s>"
    eos: str = "</s>"
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


def read_sentencepiece(path: Path) -> SentencepieceModel:
    """The vocabulary in a file.

    Raises ValueError, naming the file, for one that is damaged, absurdly large or of another format, and for settings
    that cannot be followed.
    """
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(f"{printable(path)} has {size:,} bytes; a vocabulary of more than {_MAX_BYTES:,} is not read")
    try:
        return parse_sentencepiece(path.read_bytes())
    except NotImplementedError as error:
        raise ValueError(f"{printable(path)}: {error}") from error
    except (ValueError, struct.error) as error:
        raise ValueError(
            f"{printable(path)} must be a vocabulary of sentencepiece (a protocol buffer message), and is not: "
            f"{printable(error)}; download the file again, or put the model's tokenizer.json beside it"
        ) from error


def parse_sentencepiece(content: bytes) -> SentencepieceModel:
    """The vocabulary in these bytes.

    Raises ValueError for other bytes.
    Raises NotImplementedError for settings that cannot be followed.
    """
    pieces: list[Piece] = []
    trainer, normaliser = b"", b""
    for number, value in _fields(content):
        if number == 1:
            pieces.append(_piece(_as_bytes(value)))
        elif number == 2:
            trainer = _as_bytes(value)
        elif number == 3:
            normaliser = _as_bytes(value)
        elif number == 5 and dict(_fields(_as_bytes(value))).get(2):
            raise NotImplementedError("a denormalizer_spec, which changes text after decoding, is not supported")
    if not pieces:
        raise ValueError("it holds no pieces")
    settings, rules = dict(_fields(trainer)), dict(_fields(normaliser))
    algorithm = Algorithm(_integer(settings.get(3, 1)))
    if algorithm not in (Algorithm.UNIGRAM, Algorithm.BPE):
        raise NotImplementedError(f"the algorithm must be unigram or BPE, got {algorithm.name.lower()}")
    if settings.get(24):
        raise NotImplementedError("spaces end words here (treat_whitespace_as_suffix), which is not supported")
    return SentencepieceModel(
        pieces=tuple(pieces),
        algorithm=algorithm,
        byte_fallback=bool(settings.get(35, 0)),
        bos=_text(settings.get(46, b"<s>")),
        eos=_text(settings.get(47, b"</s>")),
        charsmap=_as_bytes(rules.get(2, b"")),
        add_dummy_prefix=bool(rules.get(3, 1)),
        remove_extra_whitespaces=bool(rules.get(4, 1)),
        escape_whitespaces=bool(rules.get(5, 1)),
    )


def _piece(content: bytes) -> Piece:
    fields = dict(_fields(content))
    (score,) = struct.unpack("<f", _as_bytes(fields.get(2, b"\0\0\0\0")))
    if score != score:
        raise ValueError("a score is no number")
    return Piece(_text(fields.get(1, b"")), score, PieceKind(_integer(fields.get(3, 1))))


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The numbers and values of a message's fields."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        wire_type = key & 7
        if wire_type == _VARINT:
            value, place = _varint(content, place)
        else:
            if wire_type == _BYTES:
                length, place = _varint(content, place)
            elif wire_type in (_FIXED32, _FIXED64):
                length = 4 if wire_type == _FIXED32 else 8
            else:
                raise ValueError(f"byte {place} begins no field")
            if length > len(content) - place:
                raise ValueError(f"it ends within a field of {length:,} bytes")
            value, place = content[place : place + length], place + length
        yield key >> 3, value


def _varint(content: bytes, place: int) -> tuple[int, int]:
    """(number, place after it): seven bits in each byte, the last of which is below 128."""
    number = 0
    for index in range(10):
        if place + index >= len(content):
            raise ValueError("it ends within a number")
        byte = content[place + index]
        number |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return number, place + index + 1
    raise ValueError(f"byte {place} begins a number of more than 64 bits")


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a field has a number where bytes are expected")
    return value


def _integer(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("a field has bytes where a number is expected")
    return value


def _text(value: int | bytes) -> str:
    return _as_bytes(value).decode("utf-8")
