"""What a mixture of experts costs the busiest device, if each expert is as likely to be chosen as another."""

import math
from collections.abc import Iterator
from typing import Any

from decodax.layers.execution import Execution
from decodax.layers.moe.experts import choose_way
from decodax.layers.moe.experts._devices import default_capacity
from decodax.layers.moe.experts.gather_scatter import GatherScatter
from decodax.layers.moe.layer import MoEConfig
from decodax.layers.weight import named_weights
from decodax.sharding.plan.split import stored_bytes
from decodax.sharding.plan.work import Collective, Part, Shape


def mixture(shape: Shape, layer: MoEConfig, weights: dict[str, Any], count: int) -> list[Part]:
    """The router and what all tokens share, and the experts, of `count` equal layers."""
    experts = weights["feed_forward"]["experts"]
    around = weights | {"feed_forward": {n: w for n, w in weights["feed_forward"].items() if n != "experts"}}
    flops, weight_bytes, activations = shape.products(around, shape.num_tokens)
    shared = Part("shared and router", count, flops, weight_bytes, 0, activations, ())
    work = _busiest(shape, layer, experts)
    return [shared, Part("experts", count, *work, tuple(_collectives(shape, layer)), fetched_ahead=False)]


def _busiest(shape: Shape, layer: MoEConfig, experts: dict[str, Any]) -> tuple[float, float, float, float]:
    """FLOPs, bytes of weights, of caches (none) and of activations of the device that runs the most experts."""
    split, tokens, router = shape.split, shape.tokens, layer.router
    all_tokens, num_devices = _group_tokens(shape), split.num_parts("E")
    chance = 1 - (1 - router.experts_per_token / router.num_experts) ** all_tokens
    read = busiest_experts(router.num_experts // num_devices, num_devices, chance)
    choices = max(all_tokens * router.experts_per_token / num_devices, read)
    flops = weight_bytes = activations = 0.0  # of one expert, or of one token in it
    for name, weight in named_weights(experts, "feed_forward/experts/"):
        part = split.part_shape(weight, name)
        held = stored_bytes(part, name, weight, tokens.dtype, int8=tokens.weights == "int8")
        weight_bytes += held / part[0]
        if len(part) == 3:
            flops += 2 * math.prod(part[1:])
            activations += sum(part[1:]) * tokens.item_bytes
    return flops * choices, weight_bytes * read, 0, activations * choices


def _collectives(shape: Shape, layer: MoEConfig) -> Iterator[Collective]:
    """Those of the way to run experts that suits so many choices."""
    split, tokens = shape.split, shape.tokens
    per_token, of_group = layer.router.experts_per_token, _group_tokens(shape)
    width = split.config.hidden_size * tokens.item_bytes
    tensor, over = split.axes_of("F"), split.axes_of("E")
    way = choose_way(Execution("xla", split.mesh, split.rules), round(tokens.rows * tokens.new * per_token))
    if not over or isinstance(way, GatherScatter):
        if gathered := tuple(axis for axis in split.axes_of("B", tokens.rows) if axis in over):
            # The tokens; each choice's slot and gate, and whether there is one.
            for size in (width, 4 * per_token, 4 * per_token, per_token):
                yield Collective("all-gather", gathered, of_group * size)
        if tensor:  # results of all choices, those of other devices being zeros; what is shared goes with them
            beside = 0 if layer.shared is None else shape.hidden_bytes
            yield Collective("all-reduce", tensor, of_group * per_token * width + beside)
        if over:
            yield Collective("all-reduce", over, of_group * width)
        return
    num_devices = split.num_parts("E")
    own = -(-of_group // num_devices)
    room = default_capacity(round(own * per_token), num_devices) * num_devices
    yield from [Collective("all-to-all", over, room * width)] * 2
    if tensor:
        yield Collective("all-reduce", tensor, room * width)
        yield from () if layer.shared is None else shape.sums("F")


def _group_tokens(shape: Shape) -> int:
    """Tokens of the devices that share one set of experts: rows on other groups of devices stay there."""
    split, tokens = shape.split, shape.tokens
    groups = [axis for axis in split.axes_of("B", tokens.rows) if axis not in split.axes_of("E")]
    return tokens.rows * tokens.new // math.prod(split.degree(axis) for axis in groups)


def busiest_experts(held: int, num_devices: int, chance: float) -> float:
    """How many of its `held` experts the device with the most work runs, each with this `chance`: the mean maximum.

    >>> round(busiest_experts(4, 64, 1 - (1 - 8 / 256) ** 1), 2)  # one token of DeepSeek-V3 over 64 devices
    1.31
    """
    mean, below = 0.0, 0.0
    for few in range(held):
        below += math.comb(held, few) * chance**few * (1 - chance) ** (held - few)
        mean += 1 - min(below, 1.0) ** num_devices
    return mean
