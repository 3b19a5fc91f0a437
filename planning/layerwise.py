"""Runs Galvatron's dynamic programme: a mesh for every layer that fits the memory and takes the least time.

Galvatron: Efficient Transformer Training over Multiple GPUs Using Automatic Parallelism, arXiv 2211.13878. Departs from
it: its table has an entry for each amount of memory; here each layout keeps its Pareto front of (seconds, bytes), which
is exact for any sizes. What it calls a strategy is a layout here: a mesh of the same chips.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from decodax.models.config import BlockConfig
from decodax.planning.cost import cost
from decodax.planning.parts import block_parts
from decodax.planning.search import Plan
from decodax.planning.split import Split


class Choice(NamedTuple):
    """The cost of a layer with one layout.

    seconds: of a forward.
    num_bytes: on a chip.
    """

    seconds: float
    num_bytes: int


class Chosen(NamedTuple):
    """The selected layouts.

    seconds: of all layers, conversions included.
    num_bytes: of all layers.
    layouts: the index of each layer's layout.
    """

    seconds: float
    num_bytes: int
    layouts: tuple[int, ...]


class _State(NamedTuple):
    seconds: float
    num_bytes: int
    layout: int
    before: "_State | None"


def cheapest_layouts(
    layers: Sequence[Sequence[Choice]], conversion: Callable[[int, int], float], memory_bytes: int
) -> Chosen | None:
    """The fastest choice of one layout per layer within the memory; None if there is none.

    layers: layers[i][s] is layer i with layout s.
    conversion: conversion(s, t) is the seconds to bring activations from layout s to t.
    memory_bytes: of a chip, for all layers.
    """
    if not layers:
        raise ValueError("a plan needs at least one layer")
    fronts = [_front([_State(c.seconds, c.num_bytes, s, None)], memory_bytes) for s, c in enumerate(layers[0])]
    for layer in layers[1:]:
        grown = []
        for target, choice in enumerate(layer):
            reached = [
                _State(
                    state.seconds + conversion(source, target) + choice.seconds,
                    state.num_bytes + choice.num_bytes,
                    target,
                    state,
                )
                for source, front in enumerate(fronts)
                for state in front
            ]
            grown.append(_front(reached, memory_bytes))
        fronts = grown
    ends = [state for front in fronts for state in front]
    if not ends:
        return None
    best = min(ends, key=lambda state: (state.seconds, state.num_bytes))
    layouts: list[int] = []
    step: _State | None = best
    while step is not None:
        layouts.append(step.layout)
        step = step.before
    return Chosen(best.seconds, best.num_bytes, tuple(reversed(layouts)))


def _front(states: list[_State], memory_bytes: int) -> list[_State]:
    """The Pareto front: states that fit, and than which no other has both fewer seconds and fewer bytes."""
    kept: list[_State] = []
    least = math.inf
    for state in sorted(states, key=lambda state: (state.seconds, state.num_bytes)):
        if state.num_bytes <= memory_bytes and state.num_bytes < least:
            kept.append(state)
            least = state.num_bytes
    return kept


class PerLayer(NamedTuple):
    """What one mesh per layer could gain.

    meshes: the best mesh of each layer.
    seconds: of all layers with these.
    seconds_with_one: of all layers with the best single mesh.
    """

    meshes: tuple[str, ...]
    seconds: float
    seconds_with_one: float


def layout_per_layer(plans: Sequence[Plan]) -> PerLayer | None:
    """What a decoding step could gain if each layer had one of these plans' meshes; None if none fits.

    `decodax.load` takes one mesh, so this is a bound. Between two meshes, rows are gathered over the axes that split
    them in the first and not in the second. Embedding and head are left out.
    """
    splits = [plan.split for plan in plans if plan.split.degree("pipeline") == 1]
    if not splits:
        return None
    first = plans[0]
    tokens = first.workload.tokens(1, first.workload.context - 1)
    config, topology = first.split.config, first.topology
    rings = [topology.rings(dict(split.sizes)) for split in splits]
    cached = [plan.memory.cache // config.num_layers for plan in plans if plan.split.degree("pipeline") == 1]
    int8 = first.workload.weights == "int8"

    def choice(block: BlockConfig, index: int) -> Choice:
        split = splits[index]
        seconds = cost(block_parts(split, tokens, block), topology.chip, rings[index]).total
        weights = split.weight_bytes(block.weights(config.hidden_size), first.workload.dtype, int8=int8)
        return Choice(seconds, weights + cached[index])

    def conversion(source: int, target: int) -> float:
        axes = set(splits[source].axes_of("B", tokens.rows)) - set(splits[target].axes_of("B", tokens.rows))
        if not axes or source == target:
            return 0.0
        used_rings = tuple(ring for axis in sorted(axes) for ring in rings[source][axis])
        hidden = tokens.rows * config.hidden_size * tokens.item_bytes
        return topology.chip.network.seconds("all-gather", hidden, used_rings)

    kinds = {block: [choice(block, index) for index in range(len(splits))] for block in dict.fromkeys(config.blocks)}
    layers = [kinds[block] for block in config.blocks]
    room = first.memory.usable - first.memory.temporaries - _outside(splits[0], first)
    found = cheapest_layouts(layers, conversion, room)
    if found is None:
        return None
    with_one = min(sum(layer[index].seconds for layer in layers) for index in range(len(splits)))
    return PerLayer(tuple(splits[index].text for index in found.layouts), found.seconds, with_one)


def _outside(split: Split, plan: Plan) -> int:
    """Bytes of the embedding and the head on a chip."""
    return split.weight_bytes(split.around_layers, plan.workload.dtype)
