"""Opens `pytorch_model.bin` files as memory maps, without PyTorch and without running what they say.

`torch.save` writes a zip archive, `NAME/data.pkl` with the description of the tensors
(`models/checkpoints/restricted_pickle.py`) and `NAME/data/KEY` with the bytes of each storage, uncompressed. Nothing is
extracted: a storage is a slice of the mapped file, found by its local header. What no such archive has is refused:
compressed or encrypted storages, storages that overlap, names that come twice.
"""

import math
import mmap
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from decodax.core.printable import printable, printable_list
from decodax.models.checkpoints.model_files import find_file, read_json_object
from decodax.models.checkpoints.pickled_objects import CONVERT, ITEM_BYTES, PickledTensor
from decodax.models.checkpoints.restricted_pickle import read_state
from decodax.models.checkpoints.safetensors_files import RawTensor

SINGLE_PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_MAX_PICKLE_BYTES = 2**26  # that of a model with a hundred thousand tensors has a quarter of it
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # the last two: lengths of the name and of the extra field
_ENCRYPTED = 1
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, struct.error, OverflowError, EOFError, IndexError)


@dataclass(frozen=True, eq=False)
class StridedTensor(RawTensor):
    """A tensor whose numbers are not in order in its storage (transposed, say): `content` starts at its first one.

    strides: in numbers, of each axis.
    """

    strides: tuple[int, ...]

    def array(self, dtype: DTypeLike) -> np.ndarray:
        item = np.dtype(dtype).itemsize
        numbers = self.content.view(dtype)
        steps = tuple(stride * item for stride in self.strides)
        return np.lib.stride_tricks.as_strided(numbers, self.shape, steps, writeable=False)

    def rows(self, index: slice | np.ndarray) -> np.ndarray:
        numbers = self.array(self.dtype)
        if numbers.ndim < 3:
            return np.atleast_2d(numbers)[index]
        count = math.prod(self.shape[:-1])  # flattening the axes would copy all of it
        flat = np.arange(*index.indices(count)) if isinstance(index, slice) else index
        return numbers[np.unravel_index(flat, self.shape[:-1])]


def pickled_weight_files(folder: Path) -> list[Path]:
    """The pickled files of a folder: `pytorch_model.bin`, or those that its index names; empty without.

    Raises FileNotFoundError if a file of the index is missing, ValueError for a malformed index.
    """
    single, index = find_file(folder, SINGLE_PICKLE), find_file(folder, PICKLE_INDEX)
    if single is not None or index is None:
        return [] if single is None else [single]
    names = sorted(set(_weight_map(index).values()))
    found = {name: find_file(folder, name) for name in names}
    if missing := [name for name, file in found.items() if file is None]:
        raise FileNotFoundError(
            f"{printable(index)} names files that are not in {printable(folder)}: {printable_list(missing)}: download "
            "the folder again, whole"
        )
    return [file for file in found.values() if file is not None]


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{printable(index)} must be JSON with a weight_map of tensor names to files")
    for tensor, name in weight_map.items():
        is_plain = isinstance(name, str) and name.endswith(".bin") and not name.startswith(".")
        if not is_plain or any(character in name for character in "/\\:\0"):
            raise ValueError(
                f"{printable(index)} must name files in its own folder that end in .bin (no path), got "
                f"{printable(repr(name))} for {printable(tensor)}"
            )
    return weight_map


def open_pickled_weights(folder: Path) -> dict[str, RawTensor]:
    """Every tensor of a folder's pickled files by name; empty if it has none.

    Raises what `pickled_weight_files` and `open_pickled` raise, and ValueError for a tensor that two files hold.
    """
    stored: dict[str, RawTensor] = {}
    for file in pickled_weight_files(folder):
        tensors = open_pickled(file)
        if twice := tensors.keys() & stored.keys():
            raise ValueError(
                f"{printable(min(twice))} is in {printable(file)} and in another file of {PICKLE_INDEX}: download the "
                "files and their index again, from one revision"
            )
        stored |= tensors
    return stored


def open_pickled(file: Path) -> dict[str, RawTensor]:
    """Every tensor of a pickled file by name, in the order of their bytes.

    Raises ValueError, naming the file, for what is no archive of a state dictionary.
    """
    try:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"it is no zip archive, as torch.save writes since PyTorch 1.6: {CONVERT}")
        with file.open("rb") as stream:
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            with zipfile.ZipFile(stream) as archive:
                return _tensors(archive, mapping)
    except OSError as error:
        raise ValueError(f"{printable(file)} cannot be read: {printable(error)}") from error
    except _ZIP_ERRORS as error:
        raise ValueError(
            f"{printable(file)} is no intact zip archive ({printable(error)}): download the file again"
        ) from error
    except ValueError as error:
        raise ValueError(f"{printable(file)} cannot be read as PyTorch weights: {error}") from error


def _tensors(archive: zipfile.ZipFile, mapping: mmap.mmap) -> dict[str, RawTensor]:
    records = _records(archive)
    content = np.frombuffer(mapping, np.uint8)
    spans = _spans(records, content)
    roots = [name.removesuffix("data.pkl") for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"it has {len(roots)} files data.pkl, expected one: {CONVERT}")
    (root,) = roots
    if f"{root}constants.pkl" in records:
        raise ValueError(f"it is a TorchScript program: {CONVERT}")
    if (order := spans.get(f"{root}byteorder")) is not None and content[slice(*order)].tobytes() != b"little":
        raise ValueError(f"its byteorder is not little: {CONVERT}")
    start, end = spans[f"{root}data.pkl"]
    if end - start > _MAX_PICKLE_BYTES:
        raise ValueError(f"its data.pkl has {end - start:,} bytes; more than {_MAX_PICKLE_BYTES:,} are not read")
    state = read_state(content[start:end].tobytes())
    found = {name: _tensor(name, tensor, root, spans, content, mapping) for name, tensor in state.items()}
    return {name: tensor for name, (_, tensor) in sorted(found.items(), key=lambda item: item[1][0])}


def _records(archive: zipfile.ZipFile) -> Mapping[str, zipfile.ZipInfo]:
    """The archive's files by name; ValueError for names that come twice and for what is not stored plainly."""
    records = {info.filename: info for info in archive.infolist()}
    if len(records) != len(archive.infolist()):
        raise ValueError("a name comes twice in its archive: download the file again")
    for name, info in records.items():
        is_stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if not is_stored or info.flag_bits & _ENCRYPTED:
            raise ValueError(f"{printable(name)} in its archive is compressed or encrypted: {CONVERT}")
    return records


def _spans(records: Mapping[str, zipfile.ZipInfo], content: np.ndarray) -> dict[str, tuple[int, int]]:
    """Where the bytes of each file of the archive start and end; ValueError if they overlap or are not there."""
    spans, last = {}, 0
    for name, info in sorted(records.items(), key=lambda item: item[1].header_offset):
        start = info.header_offset
        fields = _LOCAL_HEADER.unpack(content[start : start + _LOCAL_HEADER.size].tobytes())
        first = start + _LOCAL_HEADER.size + fields[-2] + fields[-1]
        end = first + info.file_size
        if fields[0] != b"PK\3\4" or start < last or end > len(content):
            raise ValueError(
                f"{printable(name)} in its archive is not where the directory says, or overlaps another: download the "
                "file again"
            )
        spans[name], last = (first, end), end
    return spans


def _tensor(
    name: str,
    tensor: PickledTensor,
    root: str,
    spans: Mapping[str, tuple[int, int]],
    content: np.ndarray,
    mapping: mmap.mmap,
) -> tuple[int, RawTensor]:
    """A tensor, and where its first number is."""
    storage, item = tensor.storage, ITEM_BYTES[tensor.storage.kind]
    span = spans.get(f"{root}data/{storage.key}")
    if span is None or span[1] - span[0] != storage.count * item:
        found = "is not there" if span is None else f"has {span[1] - span[0]:,} bytes"
        raise ValueError(
            f"the storage {printable(storage.key)} of {printable(name)} {found}, expected {storage.count * item:,} "
            "bytes: download the file again"
        )
    start = span[0] + tensor.offset * item
    count = math.prod(tensor.shape)
    if count == 0 or tensor.strides == _in_order(tensor):
        return start, RawTensor(
            printable(name), storage.kind, tensor.shape, content[start : start + count * item], mapping
        )
    described = (printable(name), storage.kind, tensor.shape, content[start : span[1]], mapping, tensor.strides)
    return start, StridedTensor(*described)


def _in_order(tensor: PickledTensor) -> tuple[int, ...]:
    """The strides that the tensor has if its numbers are in order; those of axes of size 1 do not matter."""
    strides, step = [], 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        strides.append(stride if size == 1 else step)
        step *= size
    return tuple(reversed(strides))
