"""Reads and checks a Zarr array's metadata: its shape, its chunks and their names, and the codec of a chunk.

Everything is checked before an array is opened, because TensorStore trusts what it reads: a chunk of 2^40 numbers ends
the process while it is allocated. It reads what Orbax writes and wrote: version 2 (`.zarray`) with chunks that are
plain or in zstd, gzip or zlib, and version 3 (`zarr.json`) with plain or zstd chunks, also several in one file.

Format: https://zarr-specs.readthedocs.io (versions 2 and 3, and the codec `sharding_indexed`).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from decodax.core.printable import printable
from decodax.models.checkpoints.name_map import Shape

V2_FILE, V3_FILE = ".zarray", "zarr.json"
KINDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # safetensors' names

_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_V2_COMPRESSORS = ("zstd", "gzip", "zlib")
_MOST_AXES = 32  # of a NumPy array
_INDEX_CODECS = ["bytes", "crc32c"]


@dataclass(frozen=True)
class ZarrForm:
    """How an array is stored.

    shape: of the array.
    number: the name of its dtype.
    chunk: shape of what one file holds.
    compressor: "zstd", "gzip" or "zlib"; None: plain numbers.
    prefix, separator: of the names of its files.
    is_v2: Zarr version 2, not 3.
    inner: shape of the separately coded inner chunks of a file; None: the file is one.
    """

    shape: Shape
    number: str
    chunk: Shape
    compressor: str | None
    prefix: str
    separator: str
    is_v2: bool
    inner: Shape | None = None

    @property
    def grid(self) -> Shape:
        """Number of chunks along each axis."""
        return tuple(-(-size // step) for size, step in zip(self.shape, self.chunk, strict=True))

    @property
    def coded_bytes(self) -> int:
        """Decoded bytes of the numbers that are coded together."""
        return math.prod(self.inner or self.chunk) * _ITEM_BYTES[self.number]

    @property
    def chunk_bytes(self) -> int:
        """Decoded bytes of the numbers that one file holds."""
        return math.prod(self.chunk) * _ITEM_BYTES[self.number]

    def chunk_name(self, index: Shape) -> str:
        if not index:
            return "c" if self.prefix else "0"
        return self.prefix + self.separator.join(map(str, index))

    def chunk_index(self, name: str) -> Shape | None:
        """The index of the chunk in a file; None: it is no chunk of this array."""
        try:
            parts = name.removeprefix(self.prefix).split(self.separator)
            index = tuple(int(part) for part in parts) if self.shape else ()
        except ValueError:
            return None
        is_inside = len(index) == len(self.shape) and all(0 <= i < n for i, n in zip(index, self.grid, strict=True))
        return index if is_inside and self.chunk_name(index) == name else None


def read_v2(metadata: Mapping[str, Any]) -> ZarrForm:
    """The content of a file `.zarray`; ValueError if it is damaged, absurd or of an unsupported form."""
    shape, chunk = _shape(metadata.get("shape"), "shape"), _shape(metadata.get("chunks"), "chunks")
    _check_chunk(shape, chunk, "chunks")
    _expect("zarr_format", metadata.get("zarr_format"), [2])
    _expect("order", metadata.get("order"), ["C"])
    _expect("filters", metadata.get("filters"), [None])
    separator = metadata.get("dimension_separator", ".")
    _expect("dimension_separator", separator, [".", "/"])
    if missing := [name for name in ("compressor", "fill_value", "filters") if name not in metadata]:
        raise ValueError(f"{missing[0]} is missing, which Orbax writes even where it is null")
    compressor = metadata["compressor"]
    if compressor is not None:
        compressor = compressor.get("id") if isinstance(compressor, Mapping) else compressor
        _expect("compressor", compressor, list(_V2_COMPRESSORS))
    _check_fill_value(metadata["fill_value"])
    return ZarrForm(shape, _number_of(metadata.get("dtype")), chunk, compressor, "", separator, True)


def read_v3(metadata: Mapping[str, Any]) -> ZarrForm:
    """The content of a file `zarr.json`. Raises what `read_v2` raises."""
    _expect("zarr_format", metadata.get("zarr_format"), [3])
    _expect("node_type", metadata.get("node_type"), ["array"])
    _expect("storage_transformers", metadata.get("storage_transformers") or None, [None])
    name, grid = _named(metadata.get("chunk_grid"), "chunk_grid")
    _expect("chunk_grid", name, ["regular"])
    shape, chunk = _shape(metadata.get("shape"), "shape"), _shape(grid.get("chunk_shape"), "chunk_shape")
    _check_chunk(shape, chunk, "chunk_shape")
    name, encoding = _named(metadata.get("chunk_key_encoding"), "chunk_key_encoding")
    _expect("chunk_key_encoding", name, ["default", "v2"])
    separator = encoding.get("separator", "/" if name == "default" else ".")
    _expect("separator", separator, [".", "/"])
    prefix = f"c{separator}" if name == "default" else ""
    compressor, inner = _codecs(metadata.get("codecs"), chunk)
    number = metadata.get("data_type")
    number = printable(number) if isinstance(number, str) else "of an unknown type"
    return ZarrForm(shape, number, chunk, compressor, prefix, separator, False, inner)


def _codecs(field: Any, chunk: Shape) -> tuple[str | None, Shape | None]:
    """The compressor, and the shape of a chunk's separately coded inner chunks, if it has any."""
    names = _codec_names(field)
    if names == ["sharding_indexed"]:
        _, options = _named(field[0], "codecs")
        inner = _shape(options.get("chunk_shape"), "chunk_shape of sharding_indexed")
        _check_chunk(chunk, inner, "chunk_shape of sharding_indexed")
        if any(size % step for size, step in zip(chunk, inner, strict=True)):
            raise ValueError(f"chunk_shape of sharding_indexed must divide {list(chunk)}, got {list(inner)}")
        _expect("index_codecs", _codec_names(options.get("index_codecs")), [_INDEX_CODECS])
        _expect("index_location", options.get("index_location", "end"), ["end"])
        field, names = options.get("codecs"), _codec_names(options.get("codecs"))
    else:
        inner = None
    _expect("codecs", names, [["bytes"], ["bytes", "zstd"]])
    return ("zstd" if "zstd" in names else None), inner


def _codec_names(field: Any) -> list[str]:
    if not isinstance(field, list):
        raise ValueError(f"codecs must be a list, got {printable(json.dumps(field))}")
    return [_named(codec, "codecs")[0] for codec in field]


def _named(field: Any, what: str) -> tuple[str, Mapping[str, Any]]:
    """The name and the configuration of an extension point in the metadata of version 3."""
    if isinstance(field, Mapping) and isinstance(field.get("name"), str):
        configuration = field.get("configuration", {})
        if isinstance(configuration, Mapping):
            return field["name"], configuration
    raise ValueError(f"{what} must have a name and a configuration, got {printable(json.dumps(field))}")


def _shape(field: Any, what: str) -> Shape:
    if not isinstance(field, list) or len(field) > _MOST_AXES or not all(type(n) is int and n >= 0 for n in field):
        raise ValueError(
            f"{what} must be a list of at most {_MOST_AXES} whole numbers from 0 on, got {printable(json.dumps(field))}"
        )
    return tuple(field)


def _check_chunk(shape: Shape, chunk: Shape, what: str) -> None:
    fits = len(chunk) == len(shape) and all(1 <= step <= max(size, 1) for size, step in zip(shape, chunk, strict=True))
    if not fits:
        raise ValueError(
            f"{what} must be a size from 1 on for each axis of {list(shape)}, and no larger, got {list(chunk)}"
        )


def _expect(name: str, value: Any, allowed: list[Any]) -> None:
    if not any(type(value) is type(one) and value == one for one in allowed):
        words = " or ".join(map(json.dumps, allowed))
        raise ValueError(f"{name} must be {words}, as Orbax writes it, got {printable(json.dumps(value))}")


def _check_fill_value(value: Any) -> None:
    """Checks the value of chunks that are not stored; none is read, but TensorStore opens no array with a wrong one."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (value is None or is_number or value in ("NaN", "Infinity", "-Infinity")):
        raise ValueError(f"fill_value must be null or a number, got {printable(json.dumps(value))}")


def _number_of(field: Any) -> str:
    """The name of a dtype of version 2, such as "<f4" or "bfloat16"."""
    if field == "bfloat16":
        return field
    try:
        return np.dtype(field).name if isinstance(field, str) else "of an unknown type"
    except TypeError:
        return printable(field)
