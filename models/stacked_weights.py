"""Reads stored layer weights as the stacks that pipeline stages hold: each layer directly to its own stage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from decodax.models.checkpoints.name_map import Region, region_shape
from decodax.models.checkpoints.reading import StoredWeights, flat_weights, host_buffer
from decodax.models.families.contract import ParameterPath
from decodax.sharding.pipeline import Stages
from decodax.sharding.stacks import layer_names


@dataclass(kw_only=True)
class StackedWeights(StoredWeights):
    """Stored weights with those of pipeline stages stacked.

    by_layer: the weights as they are stored, by layer.
    layers: the paths there of what each path here stacks.
    """

    by_layer: StoredWeights
    layers: Mapping[ParameterPath, tuple[ParameterPath, ...]]

    def read(self, path: ParameterPath, region: Region, dtype: np.dtype) -> np.ndarray:
        layers = self.layers[path]
        if len(self.weights[path].shape) == len(self.by_layer.weights[layers[0]].shape):
            return self.by_layer.read(layers[0], region, dtype)
        arrays = [self.by_layer.read(layer, region[1:], dtype) for layer in layers[region[0]]]
        if len(arrays) == 1:
            return arrays[0][None]
        host = host_buffer(region_shape(region), dtype)
        for place, array in zip(host, arrays, strict=True):
            place[...] = array
        return host


def in_stages(opened: StoredWeights, weights: Mapping[str, Any], stages: Stages) -> StackedWeights:
    """Opened weights as `weights` describes them, with those of stages stacked."""
    names = layer_names(stages)
    described = flat_weights(weights)
    layers = {path: tuple((name, *path[1:]) for name in names.get(path[0], (path[0],))) for path in described}
    shared: dict[str, Any] = {name: getattr(opened, name) for name in ("folder", "stored", "names", "not_finite")}
    return StackedWeights(weights=described, filled={}, by_layer=opened, layers=layers, **shared)
