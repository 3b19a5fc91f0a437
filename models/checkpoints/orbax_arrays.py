"""Opens the arrays of an Orbax checkpoint as stored tensors, after checking their metadata and files.

An Orbax checkpoint is a folder of Zarr arrays, here one folder `blocks_0.mixer.query` for each parameter, with a file
`_METADATA` that says how they are nested. Orbax itself restores it, with any shardings; decodax reads whatever Orbax
writes (also with all arrays in one database, OCDBT, and compressed).

Nothing is trusted: an array's metadata are compared with the model's config and with the files that are there before
TensorStore opens it, which would end the process, fill the memory, or read zeros for a missing file.
`models/checkpoints/orbax_writing.py` writes the arrays.
"""

import math
import mmap
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from decodax.core.printable import printable
from decodax.models.checkpoints.compressed_chunks import check_decoded_bytes
from decodax.models.checkpoints.model_files import find_file, parse_json_object, read_json_object
from decodax.models.checkpoints.name_map import Shape
from decodax.models.checkpoints.orbax_files import FOLDER, METADATA, STORES_FILL, ArrayFiles, find_arrays, read_small
from decodax.models.checkpoints.safetensors_files import PLAIN_DTYPES
from decodax.models.checkpoints.zarr_metadata import KINDS, V2_FILE, V3_FILE, ZarrForm, read_v2, read_v3

# Arrays of the MTP head (`models/mtp_head.py`), which are not the model's own.
OTHER_WEIGHTS = r"mtp_head\..*"

_CACHE_BYTES = 2**24  # of chunks that are kept while pieces of them are read
_THREADS = 2  # each keeps memory of its own for what it has read
_INDEX_ITEM_BYTES, _CHECKSUM_BYTES = 16, 4  # of the index of a file with several inner chunks
_ABSENT = 2**64 - 1  # offset and size of an inner chunk that is not stored


@dataclass(frozen=True, eq=False)
class StoredArray:
    """A stored tensor (`models/checkpoints/weight_formats.py`) that is an array of an Orbax checkpoint.

    label: the array's name.
    form: its checked metadata.
    files: the files of all arrays.
    may_lack: chunks that hold nothing but the fill value were not written.
    context: TensorStore's.
    """

    label: str
    form: ZarrForm
    files: ArrayFiles
    may_lack: bool
    context: Any

    @property
    def kind(self) -> str:
        """The dtype's name in safetensors."""
        return KINDS.get(self.form.number, self.form.number)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.form.shape

    @property
    def mappings(self) -> tuple[mmap.mmap, ...]:
        return ()  # TensorStore reads it

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(PLAIN_DTYPES.get(self.kind, np.void))  # others are refused by name

    def rows(self, index: slice | np.ndarray) -> np.ndarray:
        store = self._checked
        if len(self.shape) < 2:
            return self._read(store)[None].reshape(1, -1)[index]
        if len(self.shape) == 2:
            return self._read(store[index])
        numbers = np.arange(index.start, index.stop, index.step) if isinstance(index, slice) else index
        return self._read(store.vindex[(*np.unravel_index(numbers, self.shape[:-1]), slice(None))])

    def check_files(self) -> int:
        """Opens the array and counts the chunks left out because they hold the fill value.

        Raises ValueError if a chunk is missing or, stored uncompressed, of a wrong size.
        """
        sizes, where = self.files.sizes[self.label], self.files.where
        chunks = self._chunks
        num_missing = math.prod(self.form.grid) - len(chunks)
        if num_missing and not self.may_lack:
            name = self.form.chunk_name(_first_missing(self.form.grid, chunks))
            raise ValueError(
                f"{where(self.label, name)} is missing, a chunk of the array {self.label} {list(self.shape)}: "
                "copy or convert the checkpoint again"
            )
        for name in chunks.values():
            if self._is_plain and sizes[name] not in (None, self.form.chunk_bytes):
                raise ValueError(
                    f"{where(self.label, name)} has {sizes[name]:,} bytes, expected {self.form.chunk_bytes:,}: copy or "
                    "convert the checkpoint again"
                )
        _ = self._opened
        return num_missing

    @property
    def _is_plain(self) -> bool:
        return self.form.compressor is None and self.form.inner is None

    @cached_property
    def _chunks(self) -> dict[Shape, str]:
        """The chunks that are stored, and the names of their files."""
        found = {self.form.chunk_index(name): name for name in self.files.sizes[self.label]}
        return {index: name for index, name in found.items() if index is not None}

    @cached_property
    def _opened(self) -> Any:
        import tensorstore  # late: most models are loaded from safetensors

        spec = {
            "driver": "zarr" if self.form.is_v2 else "zarr3",
            "kvstore": self.files.spec(self.label),
            "recheck_cached_data": "open",
            "fill_missing_data_reads": self.may_lack,
        }
        with self._told():
            return tensorstore.open(spec, open=True, read=True, context=self.context).result()

    @cached_property
    def _checked(self) -> Any:
        """The array, after checking that no chunk decodes to more bytes than it should."""
        for name in self._chunks.values():
            if self._is_plain and self.files.sizes[self.label][name] is not None:
                continue  # its size is known, and right
            content = self.files.read(self.label, name)
            try:
                for coded in _coded_chunks(self.form, content):
                    check_decoded_bytes(self.form.compressor, coded, self.form.coded_bytes)
            except ValueError as error:
                raise ValueError(
                    f"{self.files.where(self.label, name)} is no intact chunk: {error}: copy or convert the "
                    "checkpoint again"
                ) from error
        return self._opened

    def _read(self, store: Any) -> np.ndarray:
        with self._told():
            return store.read().result()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"the array {self.label} cannot be read: {printable(error)}") from error


def _first_missing(grid: Shape, present: Mapping[Shape, str]) -> Shape:
    """The first index of a grid that is not there; one is missing."""
    for flat in range(len(present) + 1):
        index, rest = (), flat
        for size in reversed(grid):
            rest, place = divmod(rest, size)
            index = (place, *index)
        if index not in present:
            return index
    raise AssertionError("nothing is missing")


def _coded_chunks(form: ZarrForm, content: memoryview) -> Iterator[memoryview]:
    """The separately coded inner chunks of a chunk's file; an index at its end has their offsets."""
    if form.inner is None:
        yield content
        return
    count = form.chunk_bytes // form.coded_bytes
    index_bytes = count * _INDEX_ITEM_BYTES + _CHECKSUM_BYTES
    if len(content) < index_bytes:
        raise ValueError(f"it has {len(content):,} bytes, fewer than its index")
    index = np.frombuffer(content[-index_bytes:-_CHECKSUM_BYTES], "<u8").reshape(count, 2).tolist()
    for start, size in index:
        if start == size == _ABSENT:
            continue  # TensorStore reports it when it reads there
        if start + size > len(content) - index_bytes:
            raise ValueError(f"its index says {start + size:,} bytes, and it has {len(content) - index_bytes:,}")
        yield content[start : start + size]


def check_arrays(folder: Path, tensors: Iterable[Any]) -> None:
    """Checks those of the tensors that are arrays, before anything is read. Raises what `check_files` raises.

    Warns of chunks that are not stored and taken for the fill value.
    """
    arrays = [tensor for tensor in tensors if isinstance(tensor, StoredArray)]
    lacking = {array.label: count for array in arrays if (count := array.check_files())}
    if lacking:
        names = ", ".join(list(lacking)[:3]) + (", ..." if len(lacking) > 3 else "")
        warnings.warn(
            f"{sum(lacking.values())} chunk(s) are not stored in {printable(folder / FOLDER)} ({printable(names)}) and "
            f"are taken for the fill value, as Orbax does where {METADATA} does not say {STORES_FILL}: if no older "
            "version of Orbax wrote them, copy the checkpoint again",
            stacklevel=3,
        )


def array_name(path: tuple[str, ...]) -> str:
    """Orbax's name for the array of a parameter."""
    return ".".join(path)


@dataclass(frozen=True)
class Metadata:
    """The content of a checkpoint's `_METADATA`.

    names: of its arrays.
    in_database: whether they are in one database; None if it does not say.
    is_v3: whether they are Zarr version 3.
    may_lack: whether chunks that hold the fill value may be missing.
    """

    names: tuple[str, ...]
    in_database: bool | None
    is_v3: bool
    may_lack: bool


def read_metadata(folder: Path) -> Metadata:
    """The metadata of the arrays in a model's folder; ValueError for a damaged checkpoint."""
    path = find_file(folder, f"{FOLDER}/{METADATA}")
    if path is None:
        raise ValueError(f"{printable(folder / FOLDER)} has no file {METADATA}: it is no Orbax checkpoint")
    raw = read_json_object(path)
    try:
        entries = [entry for entry in raw["tree_metadata"].values() if not _is_empty(entry)]
        names = [array_name(tuple(str(key["key"]) for key in entry["key_metadata"])) for entry in entries]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{printable(path)} must have tree_metadata with a list key_metadata of keys for each array: "
            "copy or convert the checkpoint again"
        ) from error
    for name in names:
        if not name or name in (".", "..") or re.search(r"[/\\\0]", name):
            raise ValueError(f"{printable(path)} names an array {printable(repr(name))}, which is no name of a file")
    for field in ("use_ocdbt", "use_zarr3", STORES_FILL):
        if not isinstance(raw.get(field), bool | None):
            raise ValueError(
                f"{printable(path)} must have {field} true or false, got {printable(raw[field])}: copy it again"
            )
    # A checkpoint without this field was written by an older Orbax, which left such chunks out.
    return Metadata(tuple(names), raw.get("use_ocdbt"), bool(raw.get("use_zarr3")), not raw.get(STORES_FILL))


def _is_empty(entry: Mapping[str, Any]) -> bool:
    """Whether an entry is an empty dictionary, for which nothing is stored."""
    value = entry.get("value_metadata")
    return isinstance(value, Mapping) and value.get("skip_deserialize") is True


def open_arrays(folder: Path) -> dict[str, StoredArray]:
    """The arrays of a model's folder by name; reads their metadata, none of their numbers.

    Raises ValueError for a damaged checkpoint.
    """
    import tensorstore

    metadata = read_metadata(folder)
    context = tensorstore.Context(
        {
            "cache_pool": {"total_bytes_limit": _CACHE_BYTES},
            "file_io_concurrency": {"limit": _THREADS},
            "data_copy_concurrency": {"limit": _THREADS},
        }
    )
    files = find_arrays(folder, metadata.in_database, context)
    file, read = (V3_FILE, read_v3) if metadata.is_v3 else (V2_FILE, read_v2)
    stored = {}
    for name in metadata.names:
        if file not in files.sizes.get(name, {}):
            raise ValueError(
                f"{printable(folder / FOLDER)} holds no array {printable(name)} that can be read: it has no {file}"
            )
        where = files.where(name, file)
        described = parse_json_object(read_small(files, name, file), where)
        try:
            form = read(described)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        stored[name] = StoredArray(name, form, files, metadata.may_lack, context)
    return stored
