"""The arrays of an Orbax checkpoint: opened as the tensors of any checkpoint are, and written in Orbax's form.

An Orbax checkpoint is a folder of Zarr arrays, here one folder `blocks_0.mixer.query` for each parameter, with a file
`_METADATA` that says how they are nested. Orbax itself restores it, with any shardings; decodax reads whatever Orbax
writes (also with all arrays in one database, OCDBT, and compressed).

It is written array by array through TensorStore, beneath Orbax. Orbax's own `save` takes all parameters at once, which
have to be in memory then, and begins anew when it is interrupted; it also names its files at random. Here one chunk is
in memory, an interrupted conversion goes on, and the same weights give the same files. Nothing is compressed: reading
is then as fast as the disk.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decodax.models.sources import Region, Shape

FOLDER = "params"  # in the model's folder
# Arrays that are not the model's own (`models/next_layer.py`).
OTHER_PARTS = r"next_layer\..*"
METADATA = "_METADATA"
CHUNK_BYTES = 2**23  # of an array in one file

_CACHE_BYTES = 2 * CHUNK_BYTES  # of chunks that are kept while pieces of them are read
_THREADS = 2  # each keeps memory of its own for what it has read
_KINDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # in the words of safetensors
_DICTIONARY_KEY = 2  # Orbax's number for the keys of dictionaries


@dataclass(frozen=True, eq=False)
class StoredArray:
    """A stored tensor (`models/stored_formats.py`) that is an array of an Orbax checkpoint. kind: as in safetensors."""

    label: str
    kind: str
    store: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.store.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype.numpy_dtype

    def rows(self, index: slice | np.ndarray) -> np.ndarray:
        if not self.shape:
            return self.store.read().result().reshape(1, 1)[index]
        if len(self.shape) == 1:
            return self.store.read().result()[None][index]
        if len(self.shape) == 2:
            return self.store[index].read().result()
        numbers = np.arange(index.start, index.stop, index.step) if isinstance(index, slice) else index
        return self.store.vindex[(*np.unravel_index(numbers, self.shape[:-1]), slice(None))].read().result()


def has_arrays(folder: Path) -> bool:
    """Whether a model's weights are an Orbax checkpoint."""
    return (folder / FOLDER / METADATA).is_file()


def array_name(path: tuple[str, ...]) -> str:
    """What Orbax calls the array of a parameter."""
    return ".".join(path)


def open_arrays(folder: Path) -> dict[str, StoredArray]:
    """The arrays of a model's folder by their names.

    Raises ValueError for a damaged checkpoint.
    """
    import tensorstore  # late: most models are loaded from safetensors

    root = folder / FOLDER
    try:
        metadata = json.loads((root / METADATA).read_text(encoding="utf-8"))
        keys = [[str(key["key"]) for key in entry["key_metadata"]] for entry in metadata["tree_metadata"].values()]
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        in_database = bool(metadata.get("use_ocdbt"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{root / METADATA} is no metadata of an Orbax checkpoint: {error!r}") from error
    context = tensorstore.Context(
        {
            "cache_pool": {"total_bytes_limit": _CACHE_BYTES},
            "file_io_concurrency": {"limit": _THREADS},
            "data_copy_concurrency": {"limit": _THREADS},
        }
    )
    stored = {}
    for name in (array_name(tuple(key)) for key in keys):
        spec = {"driver": driver, "kvstore": _kvstore(root, name, in_database), "recheck_cached_data": "open"}
        try:
            store = tensorstore.open(spec, open=True, read=True, context=context).result()
        except ValueError as error:
            raise ValueError(f"{root} holds no array {name} that can be read: {error}") from error
        kind = str(store.dtype.name)
        stored[name] = StoredArray(name, _KINDS.get(kind, kind), store)
    return stored


def _kvstore(root: Path, name: str, in_database: bool) -> dict[str, Any]:
    if in_database:
        return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{root.absolute()}/"}, "path": f"{name}/"}
    return {"driver": "file", "path": f"{(root / name).absolute()}/"}


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
    spec = {"driver": "zarr", "kvstore": _kvstore(root, name, False), "metadata": metadata}
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
