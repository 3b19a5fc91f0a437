"""Says what a stored tensor is to the reader, and reads small files of plain floats.

Tensors of a checkpoint are plain floats (`models/checkpoints/model_weights.py` opens their files) or packed in a
weight format (`models/checkpoints/formats/`). Each gives rows of plain numbers, so that a layer sees ordinary weights.
All axes but the last count as rows.
"""

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import DTypeLike

from decodax.core.printable import printable
from decodax.models.checkpoints.safetensors_files import PLAIN_DTYPES, Entry, open_file


@runtime_checkable
class StoredTensor(Entry, Protocol):
    """A tensor of a checkpoint: `label` is its name in messages, `dtype` that of the rows it gives."""

    @property
    def label(self) -> str: ...

    @property
    def dtype(self) -> np.dtype: ...

    def rows(self, index: slice | np.ndarray) -> np.ndarray:
        """[rows, last axis]; a slice gives a view of the file if nothing has to be computed."""
        ...


def read_floats(file: Path, dtype: DTypeLike) -> dict[str, np.ndarray]:
    """All tensors of a small safetensors file, in memory and rounded to `dtype`.

    Raises ValueError for a damaged file, and for a tensor with no floating-point numbers, or with non-finite ones.
    """
    arrays = {}
    for name, tensor in open_file(file).items():
        if tensor.kind not in PLAIN_DTYPES:
            raise ValueError(
                f"{printable(name)} in {printable(file)} must hold floating-point numbers ({', '.join(PLAIN_DTYPES)}), "
                f"got {printable(tensor.kind)}"
            )
        with np.errstate(all="ignore"):
            arrays[name] = tensor.array(PLAIN_DTYPES[tensor.kind]).astype(np.dtype(dtype))
        require_finite(arrays[name], name, file)
    return arrays


def require_finite(array: np.ndarray, name: str, file: Path) -> None:
    """Raises ValueError if an array of a file holds NaN or infinity."""
    if not np.isfinite(array).all():
        raise ValueError(f"{printable(name)} in {printable(file)} holds NaN or infinity (as {array.dtype.name})")
