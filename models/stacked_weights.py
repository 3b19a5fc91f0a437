"""The stored weights of layers, read as the stacks that pipeline stages hold: each layer straight to its own stage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from decodax.models.checkpoint import StoredWeights, flat_weights, host_buffer
from decodax.models.families._contract import ParameterPath
from decodax.models.sources import Region, region_shape
from decodax.sharding.pipeline import Stages
from decodax.sharding.stacks import layer_names


@dataclass(kw_only=True)
class StackedWeights(StoredWeights):
    """whole: the weights as they are stored, by layer. layers: the paths there of what each path here stacks."""

    whole: StoredWeights
    layers: Mapping[ParameterPath, tuple[ParameterPath, ...]]

    def read(self, path: ParameterPath, region: Region, dtype: np.dtype) -> np.ndarray:
        layers = self.layers[path]
        if len(self.weights[path].shape) == len(self.whole.weights[layers[0]].shape):
            return self.whole.read(layers[0], region, dtype)
        parts = [self.whole.read(layer, region[1:], dtype) for layer in layers[region[0]]]
        if len(parts) == 1:
            return parts[0][None]
        host = host_buffer(region_shape(region), dtype)
        for place, part in zip(host, parts, strict=True):
            place[...] = part
        return host


def in_stages(opened: StoredWeights, weights: Mapping[str, Any], stages: Stages) -> StackedWeights:
    """Opened weights as `weights` describes them, those of stages stacked."""
    names = layer_names(stages)
    described = flat_weights(weights)
    layers = {path: tuple((name, *path[1:]) for name in names.get(path[0], (path[0],))) for path in described}
    shared: dict[str, Any] = {name: getattr(opened, name) for name in ("folder", "stored", "names", "not_finite")}
    return StackedWeights(weights=described, filled={}, whole=opened, layers=layers, **shared)
