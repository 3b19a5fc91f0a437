"""The arrays of an Orbax checkpoint: opened as the tensors of any checkpoint are, and written in Orbax's form.

An Orbax checkpoint is a folder of Zarr arrays, here one folder `blocks_0.mixer.query` for each parameter, with a file
`_METADATA` that says how they are nested. Orbax itself restores it, with any shardings; decodax reads whatever Orbax
writes (also with all arrays in one database, OCDBT, and compressed).

It is written array by array through TensorStore, beneath Orbax. Orbax's own `save` takes all parameters at once, which
have to be in memory then, and begins anew when it is interrupted; it also names its files at random. Here one chunk is
in memory, an interrupted conversion goes on, and the same weights give the same files. Nothing is compressed: reading
is then as fast as the disk.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from decodax.models.compressed_chunks import check_decoded_bytes
from decodax.models.model_files import find_file, parse_json_object, printable, read_json_object
from decodax.models.orbax_files import FOLDER, METADATA, ArrayFiles, find_arrays, folder_spec, read_small
from decodax.models.sources import Region, Shape
from decodax.models.stored_formats import PLAIN_DTYPES
from decodax.models.zarr_form import KINDS, V2_FILE, V3_FILE, ZarrForm, read_v2, read_v3

# Arrays that are not the model's own (`models/next_layer.py`); `models/layouts.py` puts "model." in front.
OTHER_PARTS = r"model\.next_layer\..*"
CHUNK_BYTES = 2**23  # of an array in one file

_CACHE_BYTES = 2 * CHUNK_BYTES  # of chunks that are kept while pieces of them are read
_THREADS = 2  # each keeps memory of its own for what it has read
_DICTIONARY_KEY = 2  # Orbax's number for the keys of dictionaries
_STORES_FILL = "store_array_data_equal_to_fill_value"
_INDEX_ITEM_BYTES, _CHECKSUM_BYTES = 16, 4  # of the index of a file with several parts
_ABSENT = 2**64 - 1  # place and size of a part that is not stored


@dataclass(frozen=True, eq=False)
class StoredArray:
    """A stored tensor (`models/stored_formats.py`) that is an array of an Orbax checkpoint.

    may_lack: chunks that hold nothing but the fill value were not written. context: TensorStore's.
    """

    label: str
    form: ZarrForm
    files: ArrayFiles
    may_lack: bool
    context: Any

    @property
    def kind(self) -> str:
        """As in safetensors."""
        return KINDS.get(self.form.number, self.form.number)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.form.shape

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

    def check_files(self) -> None:
        """Raises ValueError where a chunk is missing or, stored plainly, of a wrong size; opens the array."""
        sizes, where = self.files.sizes[self.label], self.files.where
        chunks = self._chunks
        if len(chunks) < math.prod(self.form.grid) and not self.may_lack:
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
        """The array, none of whose chunks becomes more than it should."""
        for name in self._chunks.values():
            if self._is_plain and self.files.sizes[self.label][name] is not None:
                continue  # its size is known, and right
            content = self.files.read(self.label, name)
            try:
                for part in _coded_parts(self.form, content):
                    check_decoded_bytes(self.form.compressor, part, self.form.coded_bytes)
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


def _coded_parts(form: ZarrForm, content: memoryview) -> Iterator[memoryview]:
    """The parts of a chunk's file that are coded by themselves; an index at its end says where they are."""
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
            continue  # TensorStore says so when it reads there
        if start + size > len(content) - index_bytes:
            raise ValueError(f"its index says {start + size:,} bytes, and it has {len(content) - index_bytes:,}")
        yield content[start : start + size]


def has_arrays(folder: Path) -> bool:
    """Whether a model's weights are an Orbax checkpoint."""
    return find_file(folder, f"{FOLDER}/{METADATA}") is not None


def array_name(path: tuple[str, ...]) -> str:
    """What Orbax calls the array of a parameter."""
    return ".".join(path)


@dataclass(frozen=True)
class Metadata:
    """What a checkpoint says of itself. names: of its arrays. in_database: None where it does not say."""

    names: tuple[str, ...]
    in_database: bool | None
    is_v3: bool
    may_lack: bool


def read_metadata(folder: Path) -> Metadata:
    """What a model's folder says of its arrays; ValueError for a damaged checkpoint."""
    path = find_file(folder, f"{FOLDER}/{METADATA}")
    if path is None:
        raise ValueError(f"{printable(folder / FOLDER)} has no file {METADATA}: it is no Orbax checkpoint")
    raw = read_json_object(path)
    try:
        entries = [entry for entry in raw["tree_metadata"].values() if not _is_empty(entry)]
        names = [array_name(tuple(str(key["key"]) for key in entry["key_metadata"])) for entry in entries]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{printable(path)} is no metadata of an Orbax checkpoint: {printable(repr(error))}"
        ) from error
    for name in names:
        if not name or name in (".", "..") or re.search(r"[/\\\0]", name):
            raise ValueError(f"{printable(path)} names an array {printable(repr(name))}, which is no name of a file")
    for field in ("use_ocdbt", "use_zarr3", _STORES_FILL):
        if not isinstance(raw.get(field), bool | None):
            raise ValueError(f"{printable(path)} must have {field} true or false, got {printable(raw[field])}")
    # Without this field Orbax's older versions wrote it, which left such chunks out.
    return Metadata(tuple(names), raw.get("use_ocdbt"), bool(raw.get("use_zarr3")), not raw.get(_STORES_FILL))


def _is_empty(entry: Mapping[str, Any]) -> bool:
    """Whether it is a dictionary without anything in it, for which nothing is stored."""
    value = entry.get("value_metadata")
    return isinstance(value, Mapping) and value.get("skip_deserialize") is True


def open_arrays(folder: Path) -> dict[str, StoredArray]:
    """The arrays of a model's folder by their names: what they say of themselves, nothing of their numbers.

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


def chunk_shape(shape: Shape, itemsize: int, part: Shape | None = None) -> Shape:
    """The chunks of an array, one file each: about CHUNK_BYTES or less, cut along the first axes.

    part: what a device will hold; it is then made of whole chunks, as far as its sizes divide.

    >>> chunk_shape((4096, 14336), 2, (4096, 1792))
    (4096, 1792)
    >>> chunk_shape((8, 28672, 4096), 2)
    (1, 2048, 4096)
    """
    chunk = list(shape if part is None else part)
    for axis, size in enumerate(chunk):
        cuts = -(-math.prod(chunk) * itemsize // CHUNK_BYTES)
        if cuts <= 1:
            break
        even = next((count for count in range(cuts, min(4 * cuts, size) + 1) if size % count == 0), min(cuts, size))
        chunk[axis] = -(-size // even)
    return tuple(chunk)


def chunk_regions(shape: Shape, chunk: Shape) -> Iterator[tuple[str, Region]]:
    """The chunks of an array: the name of the file of each, and its place."""
    for index in np.ndindex(*(-(-size // step) for size, step in zip(shape, chunk, strict=True))):
        places = zip(index, chunk, shape, strict=True)
        yield ".".join(map(str, index)) or "0", tuple(slice(i * n, min((i + 1) * n, size)) for i, n, size in places)


def create_array(root: Path, name: str, shape: Shape, dtype: np.dtype, chunk: Shape) -> Any:
    """An array that is written chunk by chunk (`write_chunk`); one that is there already, of this form, is opened."""
    import tensorstore

    metadata = {
        "shape": list(shape),
        "chunks": list(chunk),
        "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.newbyteorder("<").str,
        "compressor": None,
        "filters": None,
        "fill_value": None,
        "order": "C",
        "dimension_separator": ".",
    }
    spec = {"driver": "zarr", "kvstore": folder_spec(root, name), "metadata": metadata}
    with _disk_errors():
        return tensorstore.open(spec, open=True, create=True, read=True, write=True).result()


def write_chunk(store: Any, region: Region, numbers: np.ndarray) -> None:
    """Writes a chunk's file at once, and to the disk. Raises OSError where the disk does not take it."""
    with _disk_errors():
        store[region].write(numbers).result()


@contextmanager
def _disk_errors() -> Iterator[None]:
    """TensorStore tells of the disk's errors in words; here they get their number back."""
    try:
        yield
    except ValueError as error:
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(code[1]), str(error)) from error
        raise


def metadata_of(shapes: Mapping[tuple[str, ...], Shape]) -> dict[str, Any]:
    """What Orbax's file `_METADATA` says of arrays with these paths."""

    def entry(path: tuple[str, ...], shape: Shape) -> dict[str, Any]:
        return {
            "key_metadata": [{"key": name, "key_type": _DICTIONARY_KEY} for name in path],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": list(shape)},
        }

    tree = {str(path): entry(path, shape) for path, shape in shapes.items()}
    return {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
