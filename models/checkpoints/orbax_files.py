"""Finds the files of an Orbax checkpoint and checks them: only regular files, none outside the model's folder.

An array is a folder of files, or all arrays are in one database (TensorStore's OCDBT). Both give the same here: the
names of the files of each array, and their bytes.
"""

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from decodax.core.printable import printable
from decodax.models.checkpoints.model_files import ORBAX_METADATA, find_file

FOLDER, METADATA = ORBAX_METADATA.split("/")  # the folder of arrays in the model's, and its file
DATABASE = "manifest.ocdbt"
STORES_FILL = "store_array_data_equal_to_fill_value"  # a field of METADATA

_MOST_METADATA_BYTES = 2**20  # of one array


@runtime_checkable
class ArrayFiles(Protocol):
    """The stored files of each array. `sizes`: by array name, its files' names and bytes (None: not known yet)."""

    @property
    def sizes(self) -> Mapping[str, Mapping[str, int | None]]: ...

    def where(self, name: str, file: str) -> str:
        """The name of an array's file in messages."""
        ...

    def read(self, name: str, file: str) -> memoryview: ...

    def spec(self, name: str) -> dict[str, Any]:
        """TensorStore's spec of where an array's files are."""
        ...


def regular_files(folder: Path) -> dict[str, int]:
    """The files under a model's `params`: relative names, and bytes.

    Raises ValueError for whatever is no regular file, and for a link out of the model's folder.
    """
    root, found, folders = folder / FOLDER, {}, [""]
    while folders:
        inside = folders.pop()
        with os.scandir(root / inside) as entries:
            for entry in entries:
                name = f"{inside}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{name}/")
                elif entry.is_file(follow_symlinks=False):
                    found[name] = entry.stat(follow_symlinks=False).st_size
                else:
                    file = find_file(folder, f"{FOLDER}/{name}")
                    found[name] = 0 if file is None else file.stat().st_size
    return found


@dataclass(frozen=True, eq=False)
class FolderFiles:
    """Each array in a folder of its own."""

    root: Path
    sizes: Mapping[str, Mapping[str, int | None]]

    def where(self, name: str, file: str) -> str:
        return printable(self.root / name / file)

    def read(self, name: str, file: str) -> memoryview:
        with (self.root / name / file).open("rb") as stream:
            if not os.fstat(stream.fileno()).st_size:
                return memoryview(b"")
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))

    def spec(self, name: str) -> dict[str, Any]:
        return folder_spec(self.root, name)


@dataclass(frozen=True, eq=False)
class DatabaseFiles:
    """All arrays in one database."""

    root: Path
    sizes: Mapping[str, Mapping[str, int | None]]
    store: Any

    def where(self, name: str, file: str) -> str:
        return f"{printable(f'{name}/{file}')} in the database {printable(self.root)}"

    def read(self, name: str, file: str) -> memoryview:
        try:
            return memoryview(self.store.read(f"{name}/{file}").result().value)
        except (ValueError, OSError, NotImplementedError) as error:
            raise ValueError(f"{self.where(name, file)} cannot be read: {printable(error)}") from error

    def spec(self, name: str) -> dict[str, Any]:
        return _database_spec(self.root) | {"path": f"{name}/"}


def folder_spec(root: Path, name: str) -> dict[str, Any]:
    """TensorStore's spec of an array in a folder of its own."""
    return {"driver": "file", "path": _store_path(root / name)}


def _store_path(folder: Path) -> str:
    """A folder's path as TensorStore takes it: absolute, without "..", in UTF-8; ValueError for other names."""
    try:
        path = str(folder.resolve())
        path.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{printable(folder)} has a name that is no UTF-8, which arrays cannot be read from or written to: rename "
            "the folder"
        ) from None
    return f"{path}/"


def find_arrays(folder: Path, in_database: bool | None, context: Any) -> ArrayFiles:
    """The stored files of each array in a model's folder.

    in_database: as the checkpoint says; None: it is looked up.
    context: TensorStore's.
    Raises ValueError for a damaged database, and what `regular_files` raises.
    """
    files, root = regular_files(folder), folder / FOLDER
    if in_database is None:
        in_database = DATABASE in files
    if not in_database:
        return FolderFiles(root, _by_array(files))
    import tensorstore

    if DATABASE not in files:
        raise ValueError(f"{printable(root / DATABASE)} is missing: copy the checkpoint again")
    try:
        store = tensorstore.KvStore.open(_database_spec(root), context=context).result()
        names = [name.decode("utf-8") for name in store.list().result()]
    except (ValueError, OSError, NotImplementedError) as error:
        raise ValueError(
            f"{printable(root)} is no intact database of arrays, copy it again: {printable(error)}"
        ) from error
    return DatabaseFiles(root, _by_array(dict.fromkeys(names)), store)


def _database_spec(root: Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": _store_path(root)}}


def _by_array(sizes: Mapping[str, int | None]) -> dict[str, dict[str, int | None]]:
    found: dict[str, dict[str, int | None]] = {}
    for path, size in sizes.items():
        name, _, file = path.partition("/")
        if file:
            found.setdefault(name, {})[file] = size
    return found


def read_small(files: ArrayFiles, name: str, file: str) -> bytes:
    """The metadata of an array; ValueError if it is longer than _MOST_METADATA_BYTES."""
    content = files.read(name, file)
    if len(content) > _MOST_METADATA_BYTES:
        raise ValueError(
            f"{files.where(name, file)} has {len(content):,} bytes, and an array's metadata at most "
            f"{_MOST_METADATA_BYTES:,}"
        )
    return bytes(content)
