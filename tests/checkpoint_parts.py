"""Reads a few parameters of a checkpoint by layouts of a test's own."""

import tracemalloc
from unittest import mock

import jax
import numpy as np

from decodax.layers.weight import Weight
from decodax.models import checkpoint
from decodax.models.checkpoint import open_part, read_params


def part_of(folder, layouts, shapes, *, elsewhere=".*", **options):
    """The parameters with these layouts and shapes, by name, as float32."""
    weights = {name: Weight(("V",) * len(shape), shape) for name, shape in shapes.items()}
    layouts = {(name,): layout for name, layout in layouts.items()}
    opened = open_part(folder, layouts, weights, elsewhere=elsewhere)
    return read_params(opened, **{"dtype": np.dtype(np.float32)} | options)


def peak_bytes(folder, layout, shape):
    """The most host memory that reading one parameter takes, without what is put on the device."""
    small = jax.device_put(np.ones(1))
    tracemalloc.start()
    try:
        with mock.patch.object(checkpoint, "to_device", lambda host, device: small):
            part_of(folder, {"w": (layout,)}, {"w": shape})
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
