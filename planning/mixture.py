"""Computes the cost of a mixture of experts on the busiest device, if all experts are chosen equally often."""

import math
from collections.abc import Iterator
from typing import Any

from decodax.core.weight import named_weights
from decodax.layers.execution import Execution
from decodax.layers.moe.dispatch.gather_scatter import GatherScatter
from decodax.layers.moe.dispatch.selection import select_dispatch
from decodax.layers.moe.exchange import default_capacity
from decodax.layers.moe.layer import MoEConfig
from decodax.planning.split import Split, stored_bytes
from decodax.planning.work import Collective, CostItem, Shape, Tokens


def mixture(shape: Shape, layer: MoEConfig, weights: dict[str, Any], count: int) -> list[CostItem]:
    """Cost items of `count` equal layers: the router and the shared weights, and the experts.

    shape: of the forward.
    layer: its config.
    weights: descriptions of the layer's weights.
    count: how many layers.
    """
    experts = weights["feed_forward"]["experts"]
    around = weights | {"feed_forward": {n: w for n, w in weights["feed_forward"].items() if n != "experts"}}
    flops, weight_bytes, activations = shape.products(around, shape.num_tokens)
    shared = CostItem("shared and router", count, flops, weight_bytes, 0, activations, ())
    work = _busiest(shape, layer, experts)
    return [shared, CostItem("experts", count, *work, tuple(_collectives(shape, layer)), fetched_ahead=False)]


def _busiest(shape: Shape, layer: MoEConfig, experts: dict[str, Any]) -> tuple[float, float, float, float]:
    """FLOPs, and bytes of weights, caches (none) and activations, of the device that runs the most experts."""
    split, tokens, router = shape.split, shape.tokens, layer.router
    gathered_tokens, num_devices = _group_tokens(split, tokens), split.num_shards("E")
    chance = 1 - (1 - router.experts_per_token / router.num_experts) ** gathered_tokens
    num_used = busiest_experts(router.num_experts // num_devices, num_devices, chance)
    choices = max(gathered_tokens * router.experts_per_token / num_devices, num_used)
    flops = weight_bytes = activations = 0.0  # of one expert, or of one token in it
    for name, weight in named_weights(experts, "feed_forward/experts/"):
        shard = split.shard_shape(weight, name)
        held = stored_bytes(shard, name, weight, tokens.dtype, int8=tokens.weights == "int8")
        weight_bytes += held / shard[0]
        if len(shard) == 3:
            flops += 2 * math.prod(shard[1:])
            activations += sum(shard[1:]) * tokens.item_bytes
    return flops * choices, weight_bytes * num_used, 0, activations * choices


def _collectives(shape: Shape, layer: MoEConfig) -> Iterator[Collective]:
    """The collectives of the dispatch algorithm that is selected for this number of choices."""
    split, tokens = shape.split, shape.tokens
    per_token, of_group = layer.router.experts_per_token, _group_tokens(split, tokens)
    width = split.config.hidden_size * tokens.item_bytes
    tensor, over = split.axes_of("F"), split.axes_of("E")
    dispatch = select_dispatch(Execution("xla", split.mesh, split.rules), round(tokens.rows * tokens.new * per_token))
    if not over or isinstance(dispatch, GatherScatter):
        if gathered := tuple(axis for axis in split.axes_of("B", tokens.rows) if axis in over):
            # The tokens; each choice's slot and gate, and whether it exists.
            for size in (width, 4 * per_token, 4 * per_token, per_token):
                yield Collective("all-gather", gathered, of_group * size)
        if tensor:  # results of all choices, zeros for other devices' experts; shared results are added in
            shared = 0 if layer.shared is None else shape.hidden_bytes
            yield Collective("all-reduce", tensor, of_group * per_token * width + shared)
        if over:
            yield Collective("all-reduce", over, of_group * width)
        return
    room = room_for_choices(split, layer, tokens)
    yield from [Collective("all-to-all", over, room * width)] * 2
    if tensor:
        yield Collective("all-reduce", tensor, room * width)
        yield from () if layer.shared is None else shape.all_reduces("F")


def room_for_choices(split: Split, layer: MoEConfig, tokens: Tokens) -> int:
    """Slots on a device for choices (tokens times experts per token), where devices exchange them."""
    num_devices = split.num_shards("E")
    own = -(-_group_tokens(split, tokens) // num_devices)
    return default_capacity(round(own * layer.router.experts_per_token), num_devices) * num_devices


def _group_tokens(split: Split, tokens: Tokens) -> int:
    """Tokens of the devices that share one set of experts; rows of other device groups are not among them."""
    groups = [axis for axis in split.axes_of("B", tokens.rows) if axis not in split.axes_of("E")]
    return tokens.rows * tokens.new // math.prod(split.degree(axis) for axis in groups)


def busiest_experts(held: int, num_devices: int, chance: float) -> float:
    """The expected maximum over devices of how many of its `held` experts a device runs, each with this `chance`.

    >>> round(busiest_experts(4, 64, 1 - (1 - 8 / 256) ** 1), 2)  # one token of DeepSeek-V3 over 64 devices
    1.31
    """
    mean, below = 0.0, 0.0
    for count in range(held):
        below += math.comb(held, count) * chance**count * (1 - chance) ** (held - count)
        mean += 1 - min(below, 1.0) ** num_devices
    return mean
