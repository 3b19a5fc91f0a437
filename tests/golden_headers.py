"""Unpacks the names and shapes of tensors that scripts/_golden_headers.py packed."""

import itertools


def unpacked(header):
    """The shapes of a golden header, by name."""
    shapes = {}
    for pattern, groups in header.items():
        for shape, spans in groups:
            axes = [] if not spans else [list(numbers_in(axis)) for axis in spans.split(",")]
            for indices in itertools.product(*axes):
                shapes[pattern.format(*indices)] = tuple(shape)
    return shapes


def numbers_in(axis):
    for run in axis.split(";"):
        first, last = map(int, run.split("-"))
        yield from range(first, last + 1)
