"""Reads a few parameters of a checkpoint by name maps that a test defines."""

import tracemalloc
from unittest import mock

import jax
import numpy as np

from decodax.core.weight import Weight
from decodax.models.checkpoints import reading
from decodax.models.checkpoints.reading import open_auxiliary_weights, read_params


def read_parameters(folder, name_maps, shapes, *, elsewhere=".*", **options):
    """The parameters with these name maps and shapes, by name, as float32."""
    weights = {name: Weight(("V",) * len(shape), shape) for name, shape in shapes.items()}
    name_maps = {(name,): name_map for name, name_map in name_maps.items()}
    opened = open_auxiliary_weights(folder, name_maps, weights, elsewhere=elsewhere)
    return read_params(opened, **{"dtype": np.dtype(np.float32)} | options)


def peak_bytes(folder, name_map, shape):
    """The most host memory that reading one parameter takes, without the arrays on the device."""
    small = jax.device_put(np.ones(1))
    tracemalloc.start()
    try:
        with mock.patch.object(reading, "to_device", lambda host, device: small):
            read_parameters(folder, {"w": (name_map,)}, {"w": shape})
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
