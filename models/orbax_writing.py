"""Writes the arrays of an Orbax checkpoint (`models/orbax_arrays.py` reads them).

Array by array through TensorStore, beneath Orbax. Orbax's own `save` takes all parameters at once, which have to be in
memory then, and begins anew when it is interrupted; it also names its files at random. Here one chunk is in memory, an
interrupted conversion goes on, and the same weights give the same files. Nothing is compressed: reading is then as fast
as the disk.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from decodax.models.orbax_files import STORES_FILL, folder_spec
from decodax.models.sources import Region, Shape

CHUNK_BYTES = 2**23  # of an array in one file

_DICTIONARY_KEY = 2  # Orbax's number for the keys of dictionaries


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
        STORES_FILL: True,
        "custom_metadata": None,
    }
