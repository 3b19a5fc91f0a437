"""Presents the tensors of GGUF files as stored tensors, row by row; quantised rows are decoded when they are read."""

import mmap
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from decodax.models.checkpoints.gguf.block_types import BLOCK_TYPES, PLAIN, Parts

Index = slice | np.ndarray


@runtime_checkable
class GGUFTensor(Protocol):
    """A stored tensor (`models/checkpoints/weight_formats.py`), and the mapped files that it reads."""

    @property
    def kind(self) -> str: ...

    @property
    def label(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def mappings(self) -> tuple[mmap.mmap, ...]: ...

    def rows(self, index: Index) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class BlockTensor:
    """A tensor as the file has it.

    label: its name in messages.
    block_type: its type's name in GGUF (Q4_K).
    shape: of the tensor.
    content: its bytes, uint8 [rows, bytes of a row].
    mapping: of the file.
    """

    label: str
    block_type: str
    shape: tuple[int, ...]
    content: np.ndarray
    mapping: mmap.mmap

    @property
    def kind(self) -> str:
        """The kind of its numbers, by safetensors' name."""
        return self.block_type if self.block_type in PLAIN else "F32"

    @property
    def dtype(self) -> np.dtype:
        return PLAIN[self.kind]

    @property
    def mappings(self) -> tuple[mmap.mmap, ...]:
        return (self.mapping,)

    def rows(self, index: Index) -> np.ndarray:
        """[rows, last axis]; a view of the file for a slice of plain numbers."""
        content = self.content[index]
        if self.block_type in PLAIN:
            return content.view(self.dtype)
        block = BLOCK_TYPES[self.block_type]
        return block.decode(content.reshape(-1, block.num_bytes)).reshape(-1, self.shape[-1])

    def parts(self, index: Index) -> Parts:
        """The codes, scales and offsets of rows as they are stored, each [rows, ..] for these rows.

        Codes [rows, last axis]; each of the G scales of a row is that of (last axis / G) consecutive numbers.
        Raises ValueError for a type without codes.
        """
        if self.block_type in PLAIN:
            raise ValueError(f"{self.label} is stored as {self.block_type}, which has no codes: read its rows")
        content, block = self.content[index], BLOCK_TYPES[self.block_type]
        parts = block.parts(content.reshape(-1, block.num_bytes))
        scales_in_row = self.shape[-1] // block.numbers * parts.scales.shape[-1]
        offsets = None if parts.offsets is None else parts.offsets.reshape(-1, scales_in_row)
        return Parts(parts.codes.reshape(-1, self.shape[-1]), parts.scales.reshape(-1, scales_in_row), offsets)
