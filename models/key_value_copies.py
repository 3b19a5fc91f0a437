"""Fits a mesh to fewer key-value heads than its tensor axis has devices: replicates heads over a part of that axis."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np
from jax.sharding import AxisType, Mesh

from decodax.core.weight import Weight
from decodax.models.config import ModelConfig
from decodax.sharding.rules import COPIES, automatic


def fit_mesh(mesh: Mesh, config: ModelConfig) -> Mesh:
    """The mesh for this model: its axis "tensor" is split in two if it has more devices than there are key-value heads.

    Key-value heads are then sharded over "tensor" and replicated over "tensor_copies", and query heads sharded over
    both, so that each device has the key-value head that its query heads read. The order of devices stays the same.
    """
    fitted = fit_sizes(mesh.shape, config)
    if tuple(fitted) == mesh.axis_names:
        return automatic(mesh)
    devices = np.asarray(mesh.devices).reshape(tuple(fitted.values()))
    return Mesh(devices, tuple(fitted), axis_types=(AxisType.Auto,) * len(fitted))


def fit_sizes(sizes: Mapping[str, int], config: ModelConfig) -> dict[str, int]:
    """The axis sizes of the mesh that `fit_mesh` makes, in order."""
    degree = sizes.get("tensor", 1)
    shared = {math.gcd(heads, degree) for heads in _key_value_heads(config)} - {1}
    split = min(shared, default=degree)
    if split == degree or COPIES in sizes:
        return dict(sizes)
    fitted: dict[str, int] = {}
    for name, size in sizes.items():
        fitted |= {name: split, COPIES: degree // split} if name == "tensor" else {name: size}
    return fitted


@lru_cache(maxsize=16)  # a planner asks for every mesh
def _key_value_heads(config: ModelConfig) -> set[int]:
    """The numbers of key-value heads of all layers that have some."""

    def heads(weights: dict) -> set[int]:
        found: set[int] = set()
        for value in weights.values():
            if isinstance(value, Weight):
                counts = zip(value.axes, value.counts, strict=True)
                found |= {
                    n
                    for axis_names, n in counts
                    if axis_names[0] == "K" and (axis_names == "K" or value.block_size > 1)
                }
            else:
                found |= heads(value)
        return found

    return heads(replace(config, blocks=tuple(dict.fromkeys(config.blocks))).weights())
