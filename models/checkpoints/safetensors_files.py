"""Opens the safetensors files of a folder as memory maps and checks their tensors before anything is read.

One file or several with an index. The header of each file (`models/checkpoints/file_header.py`) and the index must
agree with the files.
"""

import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from decodax.core.printable import printable, printable_list
from decodax.models.checkpoints.file_header import read_header
from decodax.models.checkpoints.model_files import find_file, read_json_object
from decodax.models.checkpoints.orbax_files import FOLDER, METADATA

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PLAIN_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_SUFFIX = ".safetensors"
_COMPARED_BYTES = 2**20


@runtime_checkable
class Entry(Protocol):
    """What is known of a stored tensor before its numbers are read.

    kind: safetensors' name of its dtype (BF16).
    shape: of the tensor.
    mappings: the mapped files that its numbers are read from.
    """

    @property
    def kind(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def mappings(self) -> tuple[mmap.mmap, ...]: ...


@dataclass(frozen=True, eq=False)
class RawTensor:
    """A tensor of a file; one with a kind of PLAIN_DTYPES is a `StoredTensor` (`models/checkpoints/weight_formats.py`).

    label: its name in messages.
    kind: its dtype's name in safetensors.
    shape: of the tensor.
    content: its bytes in the mapping.
    mapping: of the file.
    """

    label: str
    kind: str
    shape: tuple[int, ...]
    content: np.ndarray
    mapping: mmap.mmap

    @property
    def mappings(self) -> tuple[mmap.mmap, ...]:
        """The mapped files that it reads."""
        return (self.mapping,)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(PLAIN_DTYPES.get(self.kind, np.void))  # others are refused by name

    def array(self, dtype: DTypeLike) -> np.ndarray:
        """The mapped numbers."""
        return self.content.view(dtype).reshape(self.shape)

    def rows(self, index: slice | np.ndarray) -> np.ndarray:
        return self._matrix[index]

    @cached_property
    def _matrix(self) -> np.ndarray:
        return as_matrix(self.array(self.dtype))


def as_matrix(array: np.ndarray) -> np.ndarray:
    """All axes but the last as one."""
    return array.reshape(-1, array.shape[-1] if array.ndim else 1)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: `model.safetensors`, or those that its index names.

    Raises FileNotFoundError if there are none, or one is missing.
    Raises ValueError for a malformed index, and for what `find_file` refuses.
    """
    single = find_file(folder, SINGLE_FILE)
    return [single] if single is not None else _shards(folder, _weight_map(folder))


def open_weights(folder: Path) -> dict[str, RawTensor]:
    """Every tensor of a folder's safetensors files by name, in the order in which they are stored.

    Raises what `weight_files` and `open_file` raise.
    Raises ValueError if the index places a tensor in a file that does not hold it, and for a tensor that two files
    hold with different content.
    """
    single = find_file(folder, SINGLE_FILE)
    if single is not None:
        return open_file(single)
    weight_map = _weight_map(folder)
    opened = {file.name: open_file(file) for file in _shards(folder, weight_map)}
    if lost := [name for name, file in weight_map.items() if name not in opened[file]]:
        holder = next((file for file, tensors in opened.items() if lost[0] in tensors), None)
        found = "no file holds it" if holder is None else f"{printable(holder)} holds it"
        others = f" (and {len(lost) - 1} more that are not where it says)" if len(lost) > 1 else ""
        raise ValueError(
            f"{printable(folder / INDEX_FILE)} places {printable(lost[0])} in {printable(weight_map[lost[0]])}, and "
            f"{found}{others}: download the files and their index again, from one revision"
        )
    return _merged(opened)


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor by the index; FileNotFoundError without an index, ValueError for a wrong one."""
    index = find_file(folder, INDEX_FILE)
    if index is None:
        raise FileNotFoundError(f"{printable(folder)} has neither {SINGLE_FILE} nor {INDEX_FILE}{_advice(folder)}")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{printable(index)} must be JSON with a weight_map of tensor names to files")
    for tensor, file in weight_map.items():
        if not _is_plain_name(file):
            raise ValueError(
                f"{printable(index)} must name files in its own folder that end in {_SUFFIX} (no path), got "
                f"{printable(repr(file))} for {printable(tensor)}"
            )
    return weight_map


def _is_plain_name(file: Any) -> bool:
    if not isinstance(file, str) or not file.endswith(_SUFFIX) or "\0" in file:
        return False
    return not file.startswith(".") and not any(separator in file for separator in "/\\:")


def _shards(folder: Path, weight_map: Mapping[str, str]) -> list[Path]:
    found = {name: find_file(folder, name) for name in sorted(set(weight_map.values()))}
    if missing := [name for name, file in found.items() if file is None]:
        raise FileNotFoundError(
            f"{printable(folder / INDEX_FILE)} names files that are not in {printable(folder)}: "
            f"{printable_list(missing)}: download the folder again, whole"
        )
    return [file for file in found.values() if file is not None]


def _advice(folder: Path) -> str:
    def found(*patterns: str) -> str:
        return printable_list(sorted(file.name for pattern in patterns for file in folder.glob(pattern)))

    if (folder / FOLDER).is_dir() or (folder / "decodax.json").is_file():  # what `convert` wrote
        return f", nor {FOLDER}/{METADATA}, which an Orbax checkpoint has: copy the folder again, whole, or convert it"
    if names := found("*.bin", "*.pt", "*.pth"):
        return (
            f", only {names}: pickled weights are read from pytorch_model.bin, or from the files that "
            "pytorch_model.bin.index.json names. Rename a single file, or convert it with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    if names := found("*.safetensors"):
        return f", only {names}: rename a single file to model.safetensors, or add the index of several"
    return ": the weights are expected in one of them"


def open_file(file: Path) -> dict[str, RawTensor]:
    """Every tensor of a safetensors file by name, in the order of their bytes; ValueError for a damaged file."""
    header = read_header(file)
    with file.open("rb") as stream:
        mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    content = np.frombuffer(mapping, np.uint8)[header.num_bytes :]
    return {
        name: RawTensor(printable(name), entry.kind, entry.shape, content[entry.start : entry.end], mapping)
        for name, entry in header.entries.items()
    }


def _merged(files: Mapping[str, Mapping[str, RawTensor]]) -> dict[str, RawTensor]:
    """The tensors of several files; a tensor that two of them hold must be the same in both."""
    stored: dict[str, RawTensor] = {}
    holders: dict[str, str] = {}
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            if name in stored and not same_numbers(stored[name], tensor):
                raise ValueError(
                    f"{printable(name)} is in {printable(holders[name])} and in {printable(file)} with different "
                    "content: remove it from the file where it does not belong"
                )
            stored[name], holders[name] = tensor, file
    return stored


def same_numbers(one: RawTensor, other: RawTensor) -> bool:
    """Whether two tensors have the same kind, shape and bytes."""
    if one.kind != other.kind or one.shape != other.shape:
        return False
    pieces = range(0, one.content.size, _COMPARED_BYTES)
    return all(
        np.array_equal(one.content[i : i + _COMPARED_BYTES], other.content[i : i + _COMPARED_BYTES]) for i in pieces
    )


def mappings_of(stored: Mapping[str, Entry]) -> list[mmap.mmap]:
    """The mapped files that hold these tensors."""
    mappings = (mapping for tensor in stored.values() for mapping in tensor.mappings)
    return list({id(mapping): mapping for mapping in mappings}.values())


def forget_pages(mappings: Iterable[mmap.mmap]) -> None:
    """Releases the memory of the pages read from mapped files so far; what is read again is mapped again.

    The kernel would do it only when memory runs short, and until then counts the pages as this process's.
    """
    if hasattr(mmap, "MADV_DONTNEED"):  # Windows has no such thing
        for mapping in mappings:
            mapping.madvise(mmap.MADV_DONTNEED)
