"""Writes the arrays of an Orbax checkpoint (`models/checkpoints/orbax_arrays.py` reads them).

Array by array through TensorStore, which Orbax itself uses. Orbax's own `save` takes all parameters at once, which must
be in memory then, and starts over after an interruption; it also names its files at random. Here one chunk is in
memory, an interrupted conversion continues, and the same weights give the same files. Nothing is compressed: reading is
then as fast as the disk.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from decodax.models.checkpoints.name_map import Region, Shape
from decodax.models.checkpoints.orbax_files import STORES_FILL, folder_spec

CHUNK_BYTES = 2**23  # of an array in one file

_DICTIONARY_KEY = 2  # Orbax's number for the keys of dictionaries


def chunk_shape(shape: Shape, itemsize: int, shard: Shape | None = None) -> Shape:
    """The shape of an array's chunks, one file each: about CHUNK_BYTES or less, cut along the first axes.

    shard: shape of a device's shard; it then consists of full chunks, where its sizes divide.

    >>> chunk_shape((4096, 14336), 2, (4096, 1792))
    (2048, 1792)
    >>> chunk_shape((8, 28672, 4096), 2)
    (1, 1024, 4096)
    """
    chunk = list(shape if shard is None else shard)
    for axis, size in enumerate(chunk):
        cuts = -(-math.prod(chunk) * itemsize // CHUNK_BYTES)
        if cuts <= 1:
            break
        even = next((count for count in range(cuts, min(4 * cuts, size) + 1) if size % count == 0), min(cuts, size))
        chunk[axis] = -(-size // even)
    return tuple(chunk)


def chunk_regions(shape: Shape, chunk: Shape) -> Iterator[tuple[str, Region]]:
    """The chunks of an array: the file name of each, and its region."""
    for index in np.ndindex(*(-(-size // step) for size, step in zip(shape, chunk, strict=True))):
        places = zip(index, chunk, shape, strict=True)
        yield ".".join(map(str, index)) or "0", tuple(slice(i * n, min((i + 1) * n, size)) for i, n, size in places)


def create_array(root: Path, name: str, shape: Shape, dtype: np.dtype, chunk: Shape) -> Any:
    """An array to write chunk by chunk (`write_chunk`); one of this form that exists already is opened.

    root: folder of all arrays.
    name, shape, dtype: of the array.
    chunk: shape of a chunk.
    """
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
    """Writes a chunk's file and waits until it is on the disk. Raises OSError if the disk fails."""
    with _disk_errors():
        store[region].write(numbers).result()


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Turns TensorStore's text for a disk error back into an OSError with its number."""
    try:
        yield
    except ValueError as error:
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(code[1]), str(error)) from error
        raise


def metadata_of(shapes: Mapping[tuple[str, ...], Shape]) -> dict[str, Any]:
    """The content of Orbax's file `_METADATA` for arrays with these paths."""

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
        STORES_FILL: True,
        "custom_metadata": None,
    }
