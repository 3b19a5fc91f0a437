"""Defines what a weight format is: a view of the files in which each packed tensor has its own name and shape.

A program that packs a weight stores it as pieces (`X.qweight`, `X.scales`, ...). A `Format` knows its pieces and makes
one `PackedTensor` of them, `X.weight` with shape [outputs, inputs]. `models/checkpoints/formats/view.py` applies it.
Everything after that (name maps, families, reading) sees a `StoredTensor` that gives rows in float32.
"""

import mmap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from decodax.core.printable import printable
from decodax.models.checkpoints.safetensors_files import Entry, RawTensor
from decodax.models.checkpoints.weight_formats import StoredTensor


@dataclass(frozen=True)
class Parts:
    """Some rows of a packed tensor, with its codes unpacked and nothing multiplied.

        number[i, j] = ((value(codes[i, j]) - zeros[i, g]) * scales[i, g] + offsets[i, g]) * factor

    Here g is j // group_size, or group_of[j]. Every operation is one of float32, in this order.

    codes: [rows, inputs]; small whole numbers (uint8, int8), or indices of `values` (uint8).
    scales: [rows, groups], in the stored dtype where the format stores them so.
    group_size: inputs that share a scale; the last group may be cut.
    zeros: [rows, groups], whole numbers; None: 0.
    offsets: [rows, groups]; None: 0.
    values: float32, the number of each code; None: the code itself.
    group_of: the group of each input; None: consecutive groups.
    factor: of all numbers.
    """

    codes: np.ndarray
    scales: np.ndarray
    group_size: int
    zeros: np.ndarray | None = None
    offsets: np.ndarray | None = None
    values: np.ndarray | None = None
    group_of: np.ndarray | None = None
    factor: float | None = None

    def numbers(self) -> np.ndarray:
        """The numbers, float32 [rows, inputs]."""
        values = self.values  # mode="wrap": faster than checking what a code cannot exceed
        numbers = self.codes.astype(np.float32) if values is None else values.take(self.codes, mode="wrap")
        with np.errstate(all="ignore"):  # the reader reports NaN and infinity
            if self.zeros is not None:
                self._apply(np.subtract, numbers, self.zeros)
            self._apply(np.multiply, numbers, self.scales)
            if self.offsets is not None:
                self._apply(np.add, numbers, self.offsets)
            if self.factor is not None:
                numbers *= np.float32(self.factor)
        return numbers

    def _apply(self, operation: np.ufunc, numbers: np.ndarray, by_group: np.ndarray) -> None:
        """Applies an operation with each group's operand, in place."""
        operand, num_inputs = by_group.astype(np.float32), numbers.shape[1]
        if self.group_of is not None:
            operation(numbers, operand.take(self.group_of, axis=1), out=numbers)
        elif operand.shape[1] * self.group_size == num_inputs:
            grouped = numbers.reshape(len(numbers), operand.shape[1], self.group_size)
            operation(grouped, operand[:, :, None], out=grouped)
        else:
            operation(numbers, np.repeat(operand, self.group_size, axis=1)[:, :num_inputs], out=numbers)


@runtime_checkable
class PackedTensor(StoredTensor, Protocol):
    """A stored tensor of a weight format."""

    def parts(self, index: slice | np.ndarray) -> Parts:
        """Its codes and scales in these rows."""
        ...


@dataclass(frozen=True, eq=False)
class Packed:
    """What packed tensors of all formats share; each adds its pieces and `parts`.

    label: name in messages.
    shape: of the numbers, [.., outputs, inputs].
    mappings: the mapped files that hold its pieces.
    """

    label: str
    shape: tuple[int, ...]
    mappings: tuple[mmap.mmap, ...]

    kind = "F32"
    dtype = np.dtype(np.float32)

    def parts(self, index: slice | np.ndarray) -> Parts:
        raise NotImplementedError

    def rows(self, index: slice | np.ndarray) -> np.ndarray:
        return self.parts(index).numbers()

    def row_numbers(self, index: slice | np.ndarray) -> np.ndarray:
        """The numbers of the indexed rows."""
        num_rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        return np.arange(*index.indices(num_rows)) if isinstance(index, slice) else index


@dataclass(frozen=True, eq=False)
class Unreadable:
    """A stored tensor that cannot be read as numbers.

    kind, shape, mappings: as stored.
    problem: the line of an error that says why; it is shown only if a model needs the tensor.
    is_packed: whether it is stored in a weight format.
    """

    kind: str
    shape: tuple[int, ...]
    mappings: tuple[mmap.mmap, ...]
    problem: str
    is_packed: bool


@dataclass(frozen=True)
class Pieces:
    """The pieces of one packed tensor.

    name: of the tensor that they encode.
    prefix: of their names.
    stored: all tensors of the files.
    taken: the pieces found so far, by name.
    """

    name: str
    prefix: str
    stored: Mapping[str, Entry]
    taken: dict[str, RawTensor] = field(default_factory=dict)

    def has(self, suffix: str) -> bool:
        return self.prefix + suffix in self.stored

    def take(self, suffix: str, kinds: Collection[str], what: str, shape: tuple[int, ...] | None = None) -> RawTensor:
        """One piece.

        kinds: those that it may have.
        what: it is, for messages.
        shape: that it must have; None: any.
        Raises ValueError if it is missing, misshapen or of another kind.
        """
        name = self.prefix + suffix
        sizes = "" if shape is None else f" {list(shape)}"
        if name not in self.stored:
            raise ValueError(f"missing: {printable(name)}{sizes}, {what}")
        piece = self.stored[name]
        if not isinstance(piece, RawTensor) or piece.kind not in kinds:
            raise ValueError(
                f"unknown kind of number: {printable(name)} is {printable(piece.kind)}, expected one of {sorted(kinds)}"
            )
        if shape is not None and piece.shape != shape:
            raise ValueError(f"misshapen: {printable(name)} {list(piece.shape)}, expected {list(shape)}, {what}")
        self.taken[name] = piece
        return piece

    def matrix(self, suffix: str, kinds: Collection[str], what: str) -> RawTensor:
        """A piece with two axes, neither of them empty; raises what `take` raises."""
        piece = self.take(suffix, kinds, what)
        if len(piece.shape) != 2 or 0 in piece.shape:
            raise ValueError(f"misshapen: {printable(self.prefix + suffix)} {list(piece.shape)}, expected {what}")
        return piece

    @property
    def label(self) -> str:
        """The tensor's name and those of the pieces taken, for messages."""
        first, *others = (printable(name) for name in self.taken)
        return f"{first} with {' and '.join(others)}" if others else first

    @property
    def mappings(self) -> tuple[mmap.mmap, ...]:
        return tuple({id(piece.mapping): piece.mapping for piece in self.taken.values()}.values())


@dataclass(frozen=True)
class Format:
    """A weight format.

    settings: reads the fields of `quantization_config`; raises ValueError for those that are not understood.
    packed_as: (a stored tensor's name, all stored tensors) -> (the name of the tensor whose numbers it holds, the
        prefix of the names of all pieces); None if it is no such tensor.
    suffixes: of the names of all pieces.
    tensor: the packed tensor that the pieces encode; raises ValueError if they do not.
    """

    settings: Callable[[Mapping[str, Any]], Any]
    packed_as: Callable[[str, Mapping[str, Entry]], tuple[str, str] | None]
    suffixes: tuple[str, ...]
    tensor: Callable[[Pieces, Any], PackedTensor]
