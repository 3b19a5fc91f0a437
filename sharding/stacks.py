"""Parameters of pipeline stages: those of layers at the same place of different stages, stacked, and back.

A stack is called `blocks_` and its place (`Stages.layers`); its arrays have the stages in front, one on each device.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from decodax.layers.weight import Weight
from decodax.sharding.pipeline import Stages


def stack_weights(weights: dict[str, Any], stages: Stages) -> dict[str, Any]:
    """Descriptions of the parameters of a whole model, stacked."""

    def stacked(weight: Weight) -> Weight:
        return replace(weight, axes=("L", *weight.axes), shape=(stages.num_stages, *weight.shape))

    def of_place(place: int, layers: list[Any]) -> Any:
        is_weight = lambda leaf: isinstance(leaf, Weight)
        return jax.tree.map(stacked, layers[0], is_leaf=is_weight) if place in stages.own else layers[0]

    return _by_place(weights, stages, of_place)


def stack_params(params: dict[str, Any], stages: Stages) -> dict[str, Any]:
    """The parameters of a whole model, stacked."""

    def of_place(place: int, layers: list[Any]) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers) if place in stages.own else layers[0]

    return _by_place(params, stages, of_place)


def _by_place(tree: dict[str, Any], stages: Stages, of_place: Any) -> dict[str, Any]:
    result = {name: part for name, part in tree.items() if not name.startswith("blocks_")}
    for place in range(stages.num_places):
        result[f"blocks_{place}"] = of_place(place, [tree[f"blocks_{layer}"] for layer in stages.layers(place)])
    return result


def unstack_params(params: dict[str, Any], stages: Stages) -> dict[str, Any]:
    """The parameters of a whole model, one subtree per layer, from stacked ones."""
    result = {name: part for name, part in params.items() if not name.startswith("blocks_")}
    for place in range(stages.num_places):
        for stage, layer in enumerate(stages.layers(place)):
            of_layer = params[f"blocks_{place}"]
            if place in stages.own:
                of_layer = jax.tree.map(lambda leaf, stage=stage: leaf[stage], of_layer)
            result[f"blocks_{layer}"] = of_layer
    return result
