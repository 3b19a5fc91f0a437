"""Where a parameter's numbers stand in a checkpoint: which stored tensors fill it, and which part of each.

Most parameters are one stored tensor as it is. Others are a part of a fused one (the gate half of gate_up_proj), a
transposed one, or a stack of many (one matrix per expert). `Source` says so as data, and `pieces` which numbers of the
two are the same. Reading goes by it (`transfers`: any region of a parameter, whatever format the numbers are stored in,
`models/stored_formats.py`), and so does writing.

A parameter may have several layouts, because programs store the same model differently (experts stacked in one tensor,
or one tensor each). `models/layouts.py` finds the one that a checkpoint has.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from decodax.models.stored_formats import StoredTensor

Shape = tuple[int, ...]
Region = tuple[slice, ...]  # a box of a parameter: a slice with a start, a stop and no step for each axis


def whole_region(shape: Shape) -> Region:
    return tuple(slice(0, size) for size in shape)


def region_shape(region: Region) -> Shape:
    return tuple(part.stop - part.start for part in region)


@dataclass(frozen=True)
class Every:
    """Of each `period` indices along an axis, those from `start` to `stop` - 1.

    The up half of [2F, D] is Every(2 * F, F, 2 * F); the odd rows are Every(2, 1, 2); the key part of every head's
    keys and values Every(key + value, 0, key).
    """

    period: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.period:
            raise ValueError(f"a part must have 0 <= start < stop <= period, got {self}")

    @property
    def width(self) -> int:
        return self.stop - self.start

    def times(self, factor: int) -> "Every":
        """The same part of an axis whose every index has become `factor` consecutive ones."""
        return Every(self.period * factor, self.start * factor, self.stop * factor)

    def indices(self, first: int, end: int) -> slice | np.ndarray:
        """Where the selected positions first to end - 1 stand on the axis; a slice where they are evenly spaced."""
        runs, within = divmod(first, self.width)
        begin = runs * self.period + self.start + within
        if within + end - first <= self.width:
            return slice(begin, begin + end - first)
        if self.width == 1:
            return slice(begin, begin + (end - first - 1) * self.period + 1, self.period)
        runs, within = np.divmod(np.arange(first, end), self.width)
        return runs * self.period + self.start + within


@dataclass(frozen=True)
class Source:
    """The stored tensor `name`, or a part of it, and the place in the parameter that it fills.

    at: which index of the parameter's first axis (one expert of a stack); None: all of the parameter.
    part, axis: what to take of the stored tensor's `axis`; None: everything.
    transposed: the file has the last two axes the other way round ([.., inputs, outputs]).
    shape: the stored tensor's shape, where it is not the parameter's but for `at`, `part` and `transposed`: the same
        numbers in the same order, with axes before the last split, joined or of size 1 (a convolution's
        [channels, 1, taps]).
    """

    name: str
    at: int | None = None
    part: Every | None = None
    axis: int = 0
    transposed: bool = False
    shape: Shape | None = None

    def stored_shape(self, parameter: Shape) -> Shape:
        """The shape that the file must have for a parameter of this shape.

        Raises ValueError when no shape would do: the layout does not belong to this parameter.
        """
        wanted = parameter if self.at is None else parameter[1:]
        stored = self.shape
        if stored is None:
            stored = (*wanted[:-2], wanted[-1], wanted[-2]) if self.transposed else wanted
            if self.part is not None:
                size = stored[self.axis] // self.part.width * self.part.period
                stored = (*stored[: self.axis], size, *stored[self.axis + 1 :])
        selected = self._selected(stored)
        columns = selected[-2:-1] if self.transposed else selected[-1:]
        if math.prod(selected) != math.prod(wanted) or columns != wanted[-1:]:
            raise ValueError(f"{self} does not fill a parameter of shape {list(wanted)}")
        return stored

    def _selected(self, stored: Shape) -> Shape:
        """What `part` leaves of a stored shape."""
        if self.part is None:
            return stored
        size = stored[self.axis] // self.part.period * self.part.width
        return (*stored[: self.axis], size, *stored[self.axis + 1 :])


Layout = tuple[Source, ...]  # the sources that fill a parameter together
Layouts = tuple[Layout, ...]  # the ways in which it may be stored, in order of preference


def whole(name: str) -> Layouts:
    """The parameter is this tensor, as it is."""
    return ((Source(name),),)


def stack(names: str, count: int) -> Layout:
    """One tensor for each index of the parameter's first axis: `names` holds {} in the index's place."""
    return tuple(Source(names.format(index), at=index) for index in range(count))


def gated_experts(
    count: int, width: int, *, gate: str, up: str, down: str, stacked_gate_up: str, stacked_down: str
) -> Mapping[str, Layouts]:
    """The layouts of "gate" [E, F, D], "up" [E, F, D] and "down" [E, D, F] of E = `count` experts of F = `width`.

    Separate, as most files have them: one matrix per expert, named by `gate`, `up` and `down` with {} in the expert's
    place. Stacked, as transformers computes with them: `stacked_gate_up` [E, 2F, D], the gates first, and
    `stacked_down` [E, D, F].
    """
    half = {"gate": Every(2 * width, 0, width), "up": Every(2 * width, width, 2 * width)}
    return {
        "gate": (stack(gate, count), (Source(stacked_gate_up, part=half["gate"], axis=1),)),
        "up": (stack(up, count), (Source(stacked_gate_up, part=half["up"], axis=1),)),
        "down": (stack(down, count), (Source(stacked_down),)),
    }


def renamed(layouts: Layouts, prefix: str = "", *, without: str = "") -> Layouts:
    """The same layouts with `prefix` in front of every name, or `without` taken away there."""
    return tuple(
        tuple(replace(source, name=prefix + source.name.removeprefix(without)) for source in layout)
        for layout in layouts
    )


def pieces(
    source: Source, stored: Shape, parameter: Shape, region: Region, target: np.ndarray, piece_numbers: int
) -> Iterator[tuple[np.ndarray, slice | np.ndarray, slice | np.ndarray]]:
    """Which numbers are the same: (a view of `target`, their rows, their columns in the stored tensor), piece by piece.

    All axes of the stored tensor but the last, taken as one, are its rows. Of rows and columns, one is a slice.

    stored, parameter: the shapes of both. target: contiguous, the `region` of the parameter. A piece holds about
        `piece_numbers` numbers of whole stored rows. Nothing where the source fills no part of the region.
    """
    if not target.size:  # a part of width 0, as in the files of models that have none
        return
    if source.at is not None:
        if not region[0].start <= source.at < region[0].stop:
            return
        target, parameter, region = target[source.at - region[0].start, ...], parameter[1:], region[1:]
    every_row = every_column = Every(1, 0, 1)
    if source.part is not None and source.axis == len(stored) - 1:
        every_column = source.part
    elif source.part is not None:  # rows are counted over the axes in front: those in between lengthen the period
        every_row = source.part.times(math.prod(stored[source.axis + 1 : -1]))
    step = max(1, piece_numbers // max(math.prod(stored[-1:]), 1))
    for first_row, columns, matrix in _matrices(source.transposed, parameter, region, target):
        selected = every_column.indices(columns.start, columns.stop)
        for start in range(0, len(matrix), step):
            stop = min(start + step, len(matrix))
            yield matrix[start:stop], every_row.indices(first_row + start, first_row + stop), selected


def _matrices(
    transposed: bool, parameter: Shape, region: Region, target: np.ndarray
) -> Iterator[tuple[int, slice, np.ndarray]]:
    """Parts of the target that are consecutive selected rows of the stored tensor: (the first, the columns, the view).

    As few as there are: one where the region takes the axes behind the first whole.
    """
    if transposed:
        for matrix, place in zip(target.reshape(-1, *target.shape[-2:]), _places(region[:-2]), strict=True):
            first = _flat_index(parameter[:-2], place) * parameter[-1] + region[-1].start
            yield first, region[-2], matrix.T
        return
    *rows, columns = region or (slice(0, 1),)
    axis = len(rows)
    while axis > 1 and rows[axis - 1] == slice(0, parameter[axis - 1]):
        axis -= 1  # whole axes at the end are of the same run of rows
    axis = max(axis - 1, 0)
    run = math.prod(target.shape[axis:-1])
    matrices = target.reshape(-1, run, columns.stop - columns.start)
    starts = [part.start for part in rows[axis:]]
    for matrix, place in zip(matrices, _places(tuple(rows[:axis])), strict=True):
        yield _flat_index(parameter[: len(rows)], (*place, *starts)), columns, matrix


def _places(region: Region) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(part.start, part.stop) for part in region))


def _flat_index(shape: Shape, place: tuple[int, ...]) -> int:
    flat = 0
    for size, index in zip(shape, place, strict=True):
        flat = flat * size + index
    return flat


def transfers(
    source: Source, tensor: StoredTensor, parameter: Shape, region: Region, target: np.ndarray, piece_bytes: int
) -> Iterator[tuple[np.ndarray, Any]]:
    """What is to be copied from a stored tensor: (a view of the target, the numbers for it), piece by piece.

    A piece is some rows of the stored tensor: about `piece_bytes`, never a whole tensor. The tensor has the shape that
    the source asks for; the other arguments are those of `pieces`.
    """
    numbers = piece_bytes // tensor.dtype.itemsize
    for place, rows, columns in pieces(source, tensor.shape, parameter, region, target, numbers):
        yield place, tensor.rows(rows)[:, columns]
