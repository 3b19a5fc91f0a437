"""Defines `MergedTensor`: a stored tensor with a low-rank product added, as rows that are computed when they are read.

A view like those of `models/checkpoints/formats/`: only what is read is computed, on any part of a mesh alike.
"""

import mmap
from dataclasses import dataclass

import numpy as np

from decodax.models.checkpoints.weight_formats import StoredTensor

_BLOCK = 64  # rows of which the product is computed at once


@dataclass(frozen=True, eq=False)
class MergedTensor:
    """base + scale * left @ right, in float32 (float64 where the base is), rounded by the reader, once.

    The product is computed in blocks of the same rows whatever is asked for, so that a row's bits never depend on
    which rows are read with it.

    base: the stored tensor, [rows, columns].
    left: [rows, rank], as stored.
    right: [rank, columns], as stored.
    scale: of the product.
    label: name in messages.
    mappings: the mapped files that it reads.
    """

    base: StoredTensor
    left: np.ndarray
    right: np.ndarray
    scale: float
    label: str
    mappings: tuple[mmap.mmap, ...]

    @property
    def kind(self) -> str:
        return self.base.kind

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype in which a merged weight is stored: that of the base. The rows are wider."""
        return self.base.dtype

    def rows(self, index: slice | np.ndarray) -> np.ndarray:
        stored = self.base.rows(index)
        numbers = stored.astype(np.float64 if stored.dtype == np.float64 else np.float32)  # a copy
        places = np.arange(*index.indices(self.shape[0])) if isinstance(index, slice) else index
        right = self.right.astype(np.float32, copy=False)
        with np.errstate(all="ignore"):  # the reader reports NaN and infinity
            for block in np.unique(places // _BLOCK):
                chosen = np.flatnonzero(places // _BLOCK == block)
                left = self.left[block * _BLOCK : (block + 1) * _BLOCK].astype(np.float32)
                product = (left @ right) * np.float32(self.scale)
                numbers[chosen] += product[places[chosen] - block * _BLOCK]
        return numbers
