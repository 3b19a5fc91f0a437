"""Reads the header of a safetensors file: its tensors and their offsets, checked against the file's size.

Format: https://github.com/huggingface/safetensors (8 bytes header size, JSON header, then the data without holes). It
is read here, and not by the library of that name, so that each error names the file and the tensor.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decodax.core.printable import printable
from decodax.models.checkpoints.model_files import parse_json_object

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_AXES = 32
_MAX_NUMBERS = 2**62  # of a tensor, sizes of 0 left aside: what NumPy can count
_LENGTH_BYTES = 8
_POINTER = b"version https://git-lfs"
_METADATA = "__metadata__"
_AGAIN = "download or write it again"

_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


@dataclass(frozen=True)
class HeaderEntry:
    """A tensor in the header.

    kind: its dtype's name in safetensors.
    shape: of the tensor.
    start, end: offsets of its bytes after the header.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a file.

    num_bytes: up to the data.
    entries: the tensors by name, in the order of their bytes.
    """

    num_bytes: int
    entries: dict[str, HeaderEntry]


def read_header(file: Path) -> Header:
    """The header of a file whose tensors fill the rest of it exactly.

    Raises ValueError, naming the file, for any other file.
    """
    try:
        actual = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(len(_POINTER))
            if start == _POINTER:
                raise _damaged(file, "it is the pointer that Git LFS leaves in its place: run `git lfs pull` there")
            stream.seek(_LENGTH_BYTES)
            length = int.from_bytes(start[:_LENGTH_BYTES], "little")
            if length > MAX_HEADER_BYTES or _LENGTH_BYTES + length > actual:
                raise _damaged(file, f"it has {actual} bytes, too few for its header: {_AGAIN}")
            content = stream.read(length)
    except OSError as error:
        raise ValueError(f"{printable(file)} cannot be read: {printable(error)}") from error
    try:
        header = parse_json_object(content, "its header", unique=True)
        header.pop(_METADATA, None)
        entries = {name: _entry(name, entry) for name, entry in header.items()}
    except ValueError as error:
        raise _damaged(file, f"it has {actual} bytes and an unreadable header: {_AGAIN}", str(error)) from error
    num_bytes, end = _LENGTH_BYTES + length, max((entry.end for entry in entries.values()), default=0)
    if num_bytes + end != actual:
        raise _damaged(file, f"expected {num_bytes + end} bytes, it has {actual}: {_AGAIN}")
    in_order = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_order(file, in_order)
    return Header(num_bytes, in_order)


def _damaged(file: Path, sizes: str, why: str = "") -> ValueError:
    return ValueError(f"{printable(file)} is no intact safetensors file ({sizes}){why and f': {why}'}")


def _entry(name: str, entry: Any) -> HeaderEntry:
    """One tensor of a header; ValueError if its fields are wrong or do not agree."""
    tensor = printable(name)
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise ValueError(f"{tensor} must have dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if shape is None or len(shape) > _MAX_AXES or math.prod(size or 1 for size in shape) > _MAX_NUMBERS:
        raise ValueError(
            f"{tensor} must have a shape of at most {_MAX_AXES} sane sizes, got {printable(entry.get('shape'))}"
        )
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{tensor} must have data_offsets [start, end], got {printable(entry.get('data_offsets'))}")
    start, end = offsets
    bits = _BITS.get(kind)  # of an unknown kind only the offsets are known; what needs its numbers refuses it
    if bits is not None and math.prod(shape) * bits != 8 * (end - start):
        raise ValueError(f"{tensor} is {kind} {list(shape)}, and that does not fill its {end - start} bytes")
    return HeaderEntry(kind, shape, start, end)


def _sizes(value: Any) -> tuple[int, ...] | None:
    """A list of whole numbers from 0 on; None for anything else."""
    if isinstance(value, list) and all(type(size) is int and size >= 0 for size in value):
        return tuple(value)
    return None


def _check_order(file: Path, in_order: dict[str, HeaderEntry]) -> None:
    """Raises ValueError for bytes that belong to no tensor or to two."""
    end = 0
    for name, entry in in_order.items():
        if entry.start != end:
            what = "overlaps the tensor before it" if entry.start < end else "follows bytes that belong to no tensor"
            raise ValueError(
                f"{printable(file)} is no intact safetensors file: {printable(name)} {what} (at "
                f"{entry.start}, expected {end}): {_AGAIN}"
            )
        end = entry.end
