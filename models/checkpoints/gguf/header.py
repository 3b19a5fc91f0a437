"""Reads the header of a GGUF file: its key-values and its tensors, checked against the file's size.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (magic, version, two counts, key-values, tensors, then
the data, each tensor at a multiple of the alignment). It is read here, and not by the package `gguf`, which believes
the counts and offsets of a file, and takes ten times as long.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from decodax.core.printable import printable
from decodax.models.checkpoints.gguf.block_types import READ, TYPE_NAMES, row_bytes

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_BYTES = 2**28  # of a header; one with a vocabulary of a million tokens has a tenth of it
_MAX_ITEMS = 2**23  # of all arrays together
_MAX_AXES = 4  # the format's own limit
_MAX_NUMBERS = 2**62  # of a tensor, sizes of 0 left aside: what NumPy can count
_MAX_ALIGNMENT = 2**20
_DEFAULT_ALIGNMENT = 32
_AGAIN = "download it again"

_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FEWEST_KEY_BYTES = 8 + 4 + 1  # the length of a name, a type, a value
_FEWEST_TENSOR_BYTES = 8 + 4 + 4 + 8  # the length of a name, the number of axes, a type, an offset


@dataclass(frozen=True)
class HeaderTensor:
    """A tensor in the header.

    kind: the name of its type (Q4_K).
    shape: of the tensor, the axis that is contiguous last.
    start, end: offsets of its bytes in the file.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a file.

    metadata: the key-values, in the file's order.
    tensors: the tensors by name, in the order of their bytes.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, HeaderTensor]


def is_gguf(file: Path) -> bool:
    """Whether a file starts as a GGUF file does."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(file: Path, content: mmap.mmap) -> Header:
    """The header of a mapped file.

    Raises ValueError, naming the file, for one that is damaged or cut off, of another version, or with a tensor of a
    type that is not read.
    """
    try:
        return _read(content)
    except ValueError as error:
        raise ValueError(f"{printable(file)} is no GGUF file that can be read: {error}") from error


def _read(content: mmap.mmap) -> Header:
    reader = _Reader(content)
    if reader.take(len(MAGIC), "its first bytes") != MAGIC:
        raise ValueError(f"it must start with {MAGIC.decode()}, got {printable(repr(content[: len(MAGIC)]))}")
    version = reader.number("I", "its version")
    if version not in _VERSIONS:
        order = " (its bytes are in big-endian order)" if version & 0xFFFF == 0 else ""
        raise ValueError(
            f"its version must be {' or '.join(map(str, _VERSIONS))}, got {version}{order}: convert the model again "
            "with a llama.cpp of today"
        )
    num_tensors = reader.count("tensors", _FEWEST_TENSOR_BYTES)
    metadata: dict[str, Any] = {}
    for _ in range(reader.count("key-values", _FEWEST_KEY_BYTES)):
        key = reader.text("the name of a key-value")
        if key in metadata:
            raise ValueError(f"it has the key {printable(key)} twice")
        metadata[key] = reader.value(reader.number("I", f"the type of {printable(key)}"), printable(key))
    entries = [_entry(reader) for _ in range(num_tensors)]
    return Header(metadata, _tensors(entries, _alignment(metadata), reader.place, len(content)))


@dataclass
class _Reader:
    """The bytes of a header, read from the front; raises ValueError where they end.

    content: of the file.
    place: of the next byte.
    """

    content: mmap.mmap
    place: int = 0
    _items: int = 0
    _formats: dict[str, struct.Struct] = field(default_factory=dict)

    @property
    def _end(self) -> int:
        return min(len(self.content), _MAX_BYTES)

    def _advance(self, num_bytes: int, what: str) -> int:
        """The place of the next so many bytes, which are then read."""
        place = self.place
        if num_bytes > self._end - place:
            if self._end == _MAX_BYTES:
                raise ValueError(f"its header must have at most {_MAX_BYTES:,} bytes, and {what} ends after them")
            raise ValueError(f"it has {len(self.content):,} bytes and ends within {what}: {_AGAIN}")
        self.place += num_bytes
        return place

    def take(self, num_bytes: int, what: str) -> bytes:
        place = self._advance(num_bytes, what)
        return self.content[place : place + num_bytes]

    def number(self, form: str, what: str) -> Any:
        packed = self._formats.setdefault(form, struct.Struct(f"<{form}"))
        return packed.unpack_from(self.content, self._advance(packed.size, what))[0]

    def count(self, what: str, fewest_bytes: int) -> int:
        """A number of things of so many bytes each, checked against the bytes that are left."""
        count = self.number("Q", f"the number of its {what}")
        if count > (self._end - self.place) // fewest_bytes:
            raise ValueError(f"it says that it has {count:,} {what}, more than its {len(self.content):,} bytes hold")
        return count

    def text(self, what: str) -> str:
        length = self.number("Q", what)
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is no UTF-8 text ({printable(error)})") from None

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self._array(self.number("I", what), what)
        return self.number(_form(kind, what), what)

    def _array(self, kind: int, what: str) -> list[Any]:
        if kind == _ARRAY:
            raise ValueError(f"{what} is an array of arrays, which no model has")
        size = 8 if kind == _STRING else struct.calcsize(_form(kind, what))
        count = self.count(f"items of {what}", size)
        self._items += count
        if self._items > _MAX_ITEMS:
            raise ValueError(f"its arrays must have at most {_MAX_ITEMS:,} items, and {what} has {count:,}")
        if kind == _STRING:
            return [self.text(what) for _ in range(count)]
        form = _NUMBERS[kind]
        numbers = np.frombuffer(self.take(count * size, what), np.dtype(form).newbyteorder("<"))
        return numbers.tolist()


def _form(kind: int, what: str) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"{what} has a value of type {kind}, which is not known")
    return _NUMBERS[kind]


def _entry(reader: _Reader) -> tuple[str, str, tuple[int, ...], int]:
    """A tensor's name, type, shape and offset in the data."""
    name = reader.text("the name of a tensor")
    tensor = printable(name)
    num_axes = reader.number("I", tensor)
    if num_axes > _MAX_AXES:
        raise ValueError(f"{tensor} must have at most {_MAX_AXES} axes, got {num_axes:,}")
    shape = tuple(reader.number("Q", tensor) for _ in range(num_axes))[::-1]
    kind = reader.number("I", tensor)
    if prod(size or 1 for size in shape) > _MAX_NUMBERS:
        raise ValueError(f"{tensor} must have sane sizes, got {list(shape)}")
    return name, TYPE_NAMES.get(kind, f"type {kind}"), shape, reader.number("Q", tensor)


def _alignment(metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(value) is not int or not 0 < value <= _MAX_ALIGNMENT or value & (value - 1):
        raise ValueError(f"general.alignment must be a power of two up to {_MAX_ALIGNMENT:,}, got {printable(value)}")
    return value


def _tensors(
    entries: list[tuple[str, str, tuple[int, ...], int]], alignment: int, header_bytes: int, num_bytes: int
) -> dict[str, HeaderTensor]:
    """The tensors in the order of their bytes; ValueError for what is not read, overlaps, or is not in the file."""
    first = -(-header_bytes // alignment) * alignment
    tensors: dict[str, HeaderTensor] = {}
    for name, kind, shape, offset in entries:
        tensor = printable(name)
        if name in tensors:
            raise ValueError(f"it has the tensor {tensor} twice")
        if kind not in READ:
            raise ValueError(
                f"{tensor} is stored as {kind}, and what is read is {', '.join(READ)}: choose a file with these"
            )
        if offset % alignment:
            raise ValueError(f"{tensor} must start at a multiple of {alignment} (the alignment), got {offset:,}")
        row = row_bytes(kind, prod(shape[-1:]))
        if row is None:
            raise ValueError(f"{tensor} {list(shape)} is stored as {kind}, and its rows are no whole number of blocks")
        start = first + offset
        tensors[name] = HeaderTensor(kind, shape, start, start + prod(shape[:-1]) * row)
    end = first
    in_order = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    for name, tensor in in_order.items():
        if tensor.start < end:
            raise ValueError(f"{printable(name)} overlaps the tensor before it: {_AGAIN}")
        end = tensor.end
        if end > num_bytes:
            needed = max(tensor.end for tensor in in_order.values())
            raise ValueError(
                f"it is cut off: it has {num_bytes:,} bytes, and its tensors end at {needed:,} ({printable(name)} is "
                f"the first that is not there): {_AGAIN}"
            )
    return in_order
