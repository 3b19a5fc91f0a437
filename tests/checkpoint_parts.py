"""Reads a few parameters of a checkpoint by layouts of a test's own."""

import tracemalloc

import jax
import numpy as np

from decodax.layers.weight import Weight
from decodax.models.checkpoint import load_part


def part_of(folder, layouts, shapes, **options):
    """The parameters with these layouts and shapes, by name, as float32."""
    weights = {name: Weight(("V",) * len(shape), shape) for name, shape in shapes.items()}
    layouts = {(name,): layout for name, layout in layouts.items()}
    return load_part(folder, layouts, weights, **{"dtype": np.dtype(np.float32)} | options)


def peak_bytes(folder, layout, shape):
    """The most host memory that reading one parameter takes, without what is put on the device."""
    small = jax.device_put(np.ones(1))
    tracemalloc.start()
    try:
        part_of(folder, {"w": (layout,)}, {"w": shape}, put=lambda array, weight, path: small)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
