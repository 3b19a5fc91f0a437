"""Opens a model's GGUF file, or all files of a model that is split over several, as memory maps.

A split model's files are called NAME-00001-of-00003.gguf and so on; any of them stands for the model. The first has the
key-values, each has its own tensors, and all are read as one.
"""

import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from decodax.core.printable import printable, printable_list
from decodax.models.checkpoints.gguf.block_types import row_bytes
from decodax.models.checkpoints.gguf.header import Header, is_gguf, read_header
from decodax.models.checkpoints.gguf.tensors import BlockTensor
from decodax.models.checkpoints.model_files import find_file

SUFFIX = ".gguf"
_PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_COUNT, _NUMBER, _NUM_TENSORS = "split.count", "split.no", "split.tensors.count"


@dataclass(frozen=True, eq=False)
class GGUFFiles:
    """The opened files of a model.

    paths: of the files, in order.
    metadata: the key-values.
    tensors: as the files have them, by GGUF's names, in the order of their bytes.
    """

    paths: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, BlockTensor]


def find_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder's model, or the first of a split one; None if it has none.

    Raises ValueError for several models, and for what `find_file` refuses.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(SUFFIX))
    firsts = {
        name: part and f"{part['name']}-{1:05}-of-{part['count']}{SUFFIX}"
        for name in names
        for part in [_PART.fullmatch(name)]
    }
    models = sorted({first or name for name, first in firsts.items()})
    if len(models) > 1:
        raise ValueError(
            f"{printable(folder)} has {len(models)} models in GGUF ({printable_list(models, most=3)}): pass the path "
            "of one of them"
        )
    return next((find_file(folder, name) or folder / name for name in models), None)


def open_files(path: Path) -> GGUFFiles:
    """Opens the model of which a file is all or a part.

    Raises FileNotFoundError with the names of parts that are missing.
    Raises ValueError for damaged files, and for parts that do not belong together.
    """
    paths = _parts(path)
    opened = [_open(part) for part in paths]
    metadata = opened[0][0].metadata
    tensors: dict[str, BlockTensor] = {}
    for index, (part, (header, found)) in enumerate(zip(paths, opened, strict=True)):
        _check_part(part, header.metadata, index, len(paths))
        if twice := tensors.keys() & found.keys():
            raise ValueError(
                f"{printable(part)} has the tensor {printable(min(twice))}, which another part has as well"
            )
        tensors |= found
    expected = metadata.get(_NUM_TENSORS, len(tensors))
    if expected != len(tensors):
        raise ValueError(
            f"{printable(paths[0])} says that the model has {printable(expected)} tensors, and its {len(paths)} "
            f"file(s) hold {len(tensors)}: download them again, from one revision"
        )
    return GGUFFiles(paths, metadata, tensors)


def _parts(path: Path) -> tuple[Path, ...]:
    """The files of a model, in order."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {printable(path)}")
    part = _PART.fullmatch(path.name)
    if part is None:
        return (path,)
    names = [f"{part['name']}-{number:05}-of-{part['count']}{SUFFIX}" for number in range(1, int(part["count"]) + 1)]
    found = {name: find_file(path.parent, name) for name in names}
    if missing := [name for name, file in found.items() if file is None]:
        raise FileNotFoundError(
            f"{printable(path)} is one of {len(names)} parts, and beside it {printable_list(missing, most=3)} is "
            "missing: download all of them into one folder"
        )
    return tuple(file for file in found.values() if file is not None)


def _open(path: Path) -> tuple[Header, dict[str, BlockTensor]]:
    """The header of a file, and its tensors."""
    try:
        with path.open("rb") as stream:
            if not is_gguf(path):
                start = printable(repr(stream.read(4)))
                raise ValueError(f"{printable(path)} is no GGUF file: it must start with GGUF, got {start}")
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ValueError(f"{printable(path)} cannot be read: {printable(error)}") from error
    header, numbers = read_header(path, content), np.frombuffer(content, np.uint8)
    tensors = {}
    for name, tensor in header.tensors.items():
        row = row_bytes(tensor.kind, prod(tensor.shape[-1:])) or 0
        rows = numbers[tensor.start : tensor.end].reshape(prod(tensor.shape[:-1]), row)
        tensors[name] = BlockTensor(printable(name), tensor.kind, tensor.shape, rows, content)
    return header, tensors


def _check_part(path: Path, metadata: Mapping[str, Any], index: int, count: int) -> None:
    """Raises ValueError for a file that says that it is another part than its name."""
    said = metadata.get(_COUNT, 1) or 1, metadata.get(_NUMBER, 0)
    if said != (count, index):
        raise ValueError(
            f"{printable(path)} is part {printable(said[1])} of {printable(said[0])} by its key-values, counted from "
            f"0, and part {index} of {count} by its name: give the files the names that they had"
        )
