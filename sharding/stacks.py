"""Stacks the parameters of layers at the same place of all pipeline chunks, and unstacks them.

A stack is named `blocks_` and its place (`Stages.layers`); the layers are the first axis of its arrays, and each
stage's devices hold their own.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from decodax.core.weight import Weight
from decodax.sharding.pipeline import Stages

_BLOCK = "blocks_"


def stack_weights(weights: dict[str, Any], stages: Stages) -> dict[str, Any]:
    """The weight descriptions of a model, stacked."""

    def stack(weight: Weight, *others: Weight) -> Weight:
        return replace(weight, axes=("L", *weight.axes), shape=(stages.stack_size, *weight.shape))

    return _by_place(weights, stages, lambda layers: _map(stack, *layers))


def stack_params(params: dict[str, Any], stages: Stages) -> dict[str, Any]:
    """The parameters of a model, stacked."""
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
    """The layers in the subtree of each place, both by their parameter names."""
    places = range(stages.num_places)
    return {f"{_BLOCK}{place}": tuple(f"{_BLOCK}{layer}" for layer in stages.layers(place)) for place in places}


def _outside_blocks(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: subtree for name, subtree in tree.items() if not name.startswith(_BLOCK)}


def unstack_params(params: dict[str, Any], stages: Stages) -> dict[str, Any]:
    """The parameters of a model, one subtree per layer, from stacked ones."""
    result = _outside_blocks(params)
    for place in range(stages.num_places):
        for index, layer in enumerate(stages.layers(place)):
            held = params[f"{_BLOCK}{place}"]
            is_stack = place in stages.stacks
            result[f"{_BLOCK}{layer}"] = jax.tree.map(lambda leaf, index=index: leaf[index], held) if is_stack else held
    return result
