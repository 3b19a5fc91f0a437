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

    base: the stored tensor, [rows, columns], or [experts, rows, columns].
    left: [experts, rows, rank], as stored; one expert where there are none.
    right: [experts, rank, columns], as stored.
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
        experts, num_rows, _ = self.left.shape
        places = np.arange(*index.indices(experts * num_rows)) if isinstance(index, slice) else index
        expert, place = np.divmod(places, num_rows)
        num_blocks = -(-num_rows // _BLOCK)  # of an expert
        blocks = expert * num_blocks + place // _BLOCK
        with np.errstate(all="ignore"):  # the reader reports NaN and infinity
            for block in np.unique(blocks):
                chosen, start = np.flatnonzero(blocks == block), block % num_blocks * _BLOCK
                left = self.left[block // num_blocks, start : start + _BLOCK].astype(np.float32)
                right = self.right[block // num_blocks].astype(np.float32, copy=False)
                product = left @ right
                product *= np.float32(self.scale)
                numbers[_as_slice(chosen)] += product[_as_slice(place[chosen] - start)]
        return numbers


def _as_slice(rows: np.ndarray) -> slice | np.ndarray:
    """The same rows, as a slice if they follow each other, which is many times faster."""
    is_run = (np.diff(rows) == 1).all()
    return slice(int(rows[0]), int(rows[-1]) + 1) if is_run else rows
