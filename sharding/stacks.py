"""Parameters of pipeline stages: those of layers at the same place of all chunks, stacked, and back.

A stack is called `blocks_` and its place (`Stages.layers`); its arrays have the layers in front, and each stage's
devices hold their own.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from decodax.layers.weight import Weight
from decodax.sharding.pipeline import Stages

_BLOCK = "blocks_"


def stack_weights(weights: dict[str, Any], stages: Stages) -> dict[str, Any]:
    """Descriptions of the parameters of a whole model, stacked."""

    def stack(weight: Weight, *others: Weight) -> Weight:
        return replace(weight, axes=("L", *weight.axes), shape=(stages.stack_size, *weight.shape))

    return _by_place(weights, stages, lambda layers: _map(stack, *layers))


def stack_params(params: dict[str, Any], stages: Stages) -> dict[str, Any]:
    """The parameters of a whole model, stacked."""
    return _by_place(params, stages, lambda layers: _map(lambda *leaves: jnp.stack(leaves), *layers))


def _map(function: Callable[..., Any], *trees: Any) -> Any:
    return jax.tree.map(function, *trees, is_leaf=lambda leaf: isinstance(leaf, Weight))


def _by_place(tree: dict[str, Any], stages: Stages, stack: Callable[[list[Any]], Any]) -> dict[str, Any]:
    result = _outside_blocks(tree)
    for place in range(stages.num_places):
        layers = [tree[f"{_BLOCK}{layer}"] for layer in stages.layers(place)]
        result[f"{_BLOCK}{place}"] = stack(layers) if place in stages.stacks else layers[0]
    return result


def layer_names(stages: Stages) -> dict[str, tuple[str, ...]]:
    """The layers of the model that the subtree of each place holds, both by their names among parameters."""
    places = range(stages.num_places)
    return {f"{_BLOCK}{place}": tuple(f"{_BLOCK}{layer}" for layer in stages.layers(place)) for place in places}


def _outside_blocks(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in tree.items() if not name.startswith(_BLOCK)}


def unstack_params(params: dict[str, Any], stages: Stages) -> dict[str, Any]:
    """The parameters of a whole model, one subtree per layer, from stacked ones."""
    result = _outside_blocks(params)
    for place in range(stages.num_places):
        for index, layer in enumerate(stages.layers(place)):
            part = params[f"{_BLOCK}{place}"]
            is_stack = place in stages.stacks
            result[f"{_BLOCK}{layer}"] = jax.tree.map(lambda leaf, index=index: leaf[index], part) if is_stack else part
    return result
