"""Maps each parameter to the stored tensors of a checkpoint that fill it, and to the slice of each.

Most parameters are one stored tensor as it is. Others are a slice of a fused tensor (the gate half of gate_up_proj), a
transposed tensor, or a stack of many (one matrix per expert). A `TensorSlice` describes this as data; `pieces` pairs
the numbers of both. Reading (`transfers`: any region of a parameter, from any stored tensor,
`models/checkpoints/weight_formats.py`) and writing both follow it.

A parameter may have several name maps, because programs store the same model differently (experts stacked in one
tensor, or one tensor each). `models/checkpoints/name_map_selection.py` finds the one that a checkpoint has.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from decodax.models.checkpoints.weight_formats import StoredTensor

Shape = tuple[int, ...]
Region = tuple[slice, ...]  # a box of a parameter: a slice with a start, a stop and no step for each axis


def full_region(shape: Shape) -> Region:
    return tuple(slice(0, size) for size in shape)


def region_shape(region: Region) -> Shape:
    return tuple(span.stop - span.start for span in region)


@dataclass(frozen=True)
class PeriodicSlice:
    """Of each `period` indices along an axis, those from `start` to `stop` - 1.

    The up half of [2F, D] is PeriodicSlice(2 * F, F, 2 * F); the odd rows are PeriodicSlice(2, 1, 2); the keys of every
    head's keys and values are PeriodicSlice(key + value, 0, key).
    """

    period: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.period:
            raise ValueError(f"a periodic slice must have 0 <= start < stop <= period, got {self}")

    @property
    def width(self) -> int:
        return self.stop - self.start

    def times(self, factor: int) -> "PeriodicSlice":
        """The same slice of an axis whose every index has become `factor` consecutive ones."""
        return PeriodicSlice(self.period * factor, self.start * factor, self.stop * factor)

    def indices(self, first: int, end: int) -> slice | np.ndarray:
        """The axis indices of the selected positions first to end - 1; a slice where they are evenly spaced."""
        runs, within = divmod(first, self.width)
        begin = runs * self.period + self.start + within
        if within + end - first <= self.width:
            return slice(begin, begin + end - first)
        if self.width == 1:
            return slice(begin, begin + (end - first - 1) * self.period + 1, self.period)
        runs, within = np.divmod(np.arange(first, end), self.width)
        return runs * self.period + self.start + within


@dataclass(frozen=True)
class TensorSlice:
    """A stored tensor, or a slice of it, and the index of the parameter that it fills.

    name: of the stored tensor.
    at: index on the parameter's first axis (one expert of a stack); None: all of the parameter.
    part: the slice to take along `axis`; None: everything.
    axis: of the stored tensor, for `part`.
    transposed: the file has the last two axes swapped ([.., inputs, outputs]).
    shape: the stored tensor's shape, where it differs from the parameter's by more than `at`, `part` and `transposed`:
        the same numbers in the same order, with axes before the last split, merged or of size 1 (a convolution's
        [channels, 1, taps]).
    """

    name: str
    at: int | None = None
    part: PeriodicSlice | None = None
    axis: int = 0
    transposed: bool = False
    shape: Shape | None = None

    def stored_shape(self, parameter: Shape) -> Shape:
        """The shape that the file must have for a parameter of this shape.

        Raises ValueError when no shape fits: the name map does not belong to this parameter.
        """
        target = parameter if self.at is None else parameter[1:]
        stored = self.shape
        if stored is None:
            stored = (*target[:-2], target[-1], target[-2]) if self.transposed else target
            if self.part is not None:
                size = stored[self.axis] // self.part.width * self.part.period
                stored = (*stored[: self.axis], size, *stored[self.axis + 1 :])
        selected = self._selected(stored)
        columns = selected[-2:-1] if self.transposed else selected[-1:]
        if math.prod(selected) != math.prod(target) or columns != target[-1:]:
            raise ValueError(f"{self} does not fill a parameter of shape {list(target)}")
        return stored

    def _selected(self, stored: Shape) -> Shape:
        """What `part` leaves of a stored shape."""
        if self.part is None:
            return stored
        size = stored[self.axis] // self.part.period * self.part.width
        return (*stored[: self.axis], size, *stored[self.axis + 1 :])


NameMap = tuple[TensorSlice, ...]  # the slices that together fill a parameter
NameMaps = tuple[NameMap, ...]  # the alternatives in which it may be stored, in order of preference


def single_tensor(name: str) -> NameMaps:
    """The parameter is this tensor, as it is."""
    return ((TensorSlice(name),),)


def fused_rows(
    name: str, sizes: Mapping[str, int], *, axis: int = 0, shape: Shape | None = None, transposed: bool = False
) -> dict[str, NameMaps]:
    """Parameters whose rows alternate in one tensor: the name maps of each.

    name: of the tensor.
    sizes: of each parameter, how many of its rows follow each other.
    axis: of the rows in the tensor; 1 in one with experts before them.
    shape: of the tensor, where `TensorSlice.shape` needs it.
    transposed: the file has [inputs, outputs], and `axis` is that of its columns.

    >>> fused_rows("qkv", {"query": 8, "key": 4, "value": 4})["key"][0][0].part
    PeriodicSlice(period=16, start=8, stop=12)
    """
    total, start, name_maps = sum(sizes.values()), 0, {}
    for parameter, size in sizes.items():
        part = PeriodicSlice(total, start, start + size)
        name_maps[parameter] = ((TensorSlice(name, part=part, axis=axis, transposed=transposed, shape=shape),),)
        start += size
    return name_maps


def stack(names: str, count: int) -> NameMap:
    """One tensor for each index of the parameter's first axis: `names` has {} for the index."""
    return tuple(TensorSlice(names.format(index), at=index) for index in range(count))


def gated_experts(
    count: int, width: int, *, gate: str, up: str, down: str, stacked_gate_up: str, stacked_down: str
) -> Mapping[str, NameMaps]:
    """The name maps of "gate" [E, F, D], "up" [E, F, D] and "down" [E, D, F].

    count: number of experts, E.
    width: of an expert, F.
    gate, up, down: names of separate tensors, one matrix per expert as in most files; {} is the expert's index.
    stacked_gate_up: name of the stacked tensor [E, 2F, D] that transformers computes with, the gates first.
    stacked_down: name of its stacked tensor [E, D, F].
    """
    half = {"gate": PeriodicSlice(2 * width, 0, width), "up": PeriodicSlice(2 * width, width, 2 * width)}
    return {
        "gate": (stack(gate, count), (TensorSlice(stacked_gate_up, part=half["gate"], axis=1),)),
        "up": (stack(up, count), (TensorSlice(stacked_gate_up, part=half["up"], axis=1),)),
        "down": (stack(down, count), (TensorSlice(stacked_down),)),
    }


def renamed(name_maps: NameMaps, prefix: str = "", *, without: str = "") -> NameMaps:
    """The same name maps with `prefix` added to every name, or the prefix `without` removed."""
    return tuple(
        tuple(replace(tensor_slice, name=prefix + tensor_slice.name.removeprefix(without)) for tensor_slice in name_map)
        for name_map in name_maps
    )


def pieces(
    tensor_slice: TensorSlice, stored: Shape, parameter: Shape, region: Region, target: np.ndarray, piece_numbers: int
) -> Iterator[tuple[np.ndarray, slice | np.ndarray, slice | np.ndarray]]:
    """Yields (a view of `target`, its rows, its columns in the stored tensor) with the same numbers, piece by piece.

    All axes of the stored tensor but the last, flattened, are its rows. Of rows and columns, one is a slice. Yields
    nothing where the tensor slice fills nothing of the region.

    stored: shape of the stored tensor.
    parameter: shape of the parameter.
    region: of the parameter.
    target: contiguous, the `region` of the parameter.
    piece_numbers: about how many numbers a piece holds, in full stored rows.
    """
    if not target.size:  # a slice of width 0, as in the files of models that have none
        return
    if tensor_slice.at is not None:
        if not region[0].start <= tensor_slice.at < region[0].stop:
            return
        target, parameter, region = target[tensor_slice.at - region[0].start, ...], parameter[1:], region[1:]
    every_row = every_column = PeriodicSlice(1, 0, 1)
    if tensor_slice.part is not None and tensor_slice.axis == len(stored) - 1:
        every_column = tensor_slice.part
    elif tensor_slice.part is not None:  # rows are counted over the first axes: those in between lengthen the period
        every_row = tensor_slice.part.times(math.prod(stored[tensor_slice.axis + 1 : -1]))
    step = max(1, piece_numbers // max(math.prod(stored[-1:]), 1))
    for first_row, columns, matrix in _matrices(tensor_slice.transposed, parameter, region, target):
        selected = every_column.indices(columns.start, columns.stop)
        for start in range(0, len(matrix), step):
            stop = min(start + step, len(matrix))
            yield matrix[start:stop], every_row.indices(first_row + start, first_row + stop), selected


def _matrices(
    transposed: bool, parameter: Shape, region: Region, target: np.ndarray
) -> Iterator[tuple[int, slice, np.ndarray]]:
    """Splits the target into runs of consecutive selected rows of the stored tensor: (first row, columns, view).

    As few as possible: one where the region takes all of the axes after the first.
    """
    if transposed:
        for matrix, place in zip(target.reshape(-1, *target.shape[-2:]), _places(region[:-2]), strict=True):
            first = _flat_index(parameter[:-2], place) * parameter[-1] + region[-1].start
            yield first, region[-2], matrix.T
        return
    *rows, columns = region or (slice(0, 1),)
    axis = len(rows)
    while axis > 1 and rows[axis - 1] == slice(0, parameter[axis - 1]):
        axis -= 1  # full axes at the end belong to the same run of rows
    axis = max(axis - 1, 0)
    run = math.prod(target.shape[axis:-1])
    matrices = target.reshape(-1, run, columns.stop - columns.start)
    starts = [span.start for span in rows[axis:]]
    for matrix, place in zip(matrices, _places(tuple(rows[:axis])), strict=True):
        yield _flat_index(parameter[: len(rows)], (*place, *starts)), columns, matrix


def _places(region: Region) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(span.start, span.stop) for span in region))


def _flat_index(shape: Shape, place: tuple[int, ...]) -> int:
    flat = 0
    for size, index in zip(shape, place, strict=True):
        flat = flat * size + index
    return flat


def transfers(
    tensor_slice: TensorSlice,
    tensor: StoredTensor,
    parameter: Shape,
    region: Region,
    target: np.ndarray,
    piece_bytes: int,
) -> Iterator[tuple[np.ndarray, Any]]:
    """Yields what to copy from a stored tensor: (a view of the target, the numbers for it), piece by piece.

    tensor: of the shape that the tensor slice asks for.
    piece_bytes: about the size of a piece, some rows of the stored tensor, never all of it.
    parameter, region, target: as for `pieces`.
    """
    numbers = piece_bytes // tensor.dtype.itemsize
    for place, rows, columns in pieces(tensor_slice, tensor.shape, parameter, region, target, numbers):
        yield place, tensor.rows(rows)[:, columns]
