"""Gives examples of every dispatch algorithm: on one device and on eight, with copies and slices of experts."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType

from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.feed_forward import Activation, ClampedSwiGLU
from decodax.layers.moe.dispatch.all_to_all import AllToAll
from decodax.layers.moe.dispatch.contract import ExpertDispatch, Setting
from decodax.layers.moe.dispatch.dense import Dense
from decodax.layers.moe.dispatch.gather_scatter import GatherScatter
from decodax.layers.moe.dispatch.hierarchical import Hierarchical
from decodax.layers.moe.dispatch.sliced import Sliced
from decodax.layers.moe.dispatch.sorted import Sorted
from decodax.layers.moe.placement import Placement
from decodax.sharding.rules import Rules

MANY, FEW = 16, 2  # experts: more and fewer than devices


def _execution(rules, **axes) -> Execution:
    kinds = (AxisType.Auto,) * len(axes)
    return Execution(mesh=jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds), rules=Rules(rules))


FLAT = _execution((("E", "device"),), device=8)
NODES = _execution((("E", ("node", "device")),), node=2, device=4)
BOTH = _execution((("E", "node"), ("F", "device")), node=2, device=4)
FEATURES_SPLIT = _execution((("F", "device"),), node=2, device=4)


def _shuffled(num_devices: int, per_device: int) -> Placement:
    """All experts placed at random, and the busy first ones also in all remaining slots."""
    slots = np.random.default_rng(5).permutation(num_devices * per_device)
    places = [[] for _ in range(MANY)]
    for index, slot in enumerate(slots):
        places[index if index < MANY else index % 3].append((int(slot) // per_device, int(slot) % per_device))
    return Placement(MANY, num_devices, per_device, tuple(map(tuple, places)))


SHUFFLED, FOURTHS, HALVES = _shuffled(8, 3), Placement.contiguous(FEW, 8, 4), Placement.contiguous(MANY, 8, 2)


@dataclass(frozen=True)
class Case:
    """A dispatch algorithm and where it runs.

    bias: the experts have biases, and with them the activation of gpt-oss.
    sent_to: the devices to which an exchange sends a token's choice of an expert, from (expert, token); None without an
        exchange.
    overflows: the capacity of the exchange is too small for some routes.
    """

    dispatch: ExpertDispatch
    execution: Execution = ON_THIS_DEVICE
    placement: Placement | None = None
    num_experts: int = MANY
    bias: bool = False
    sent_to: Callable[[int, int], list[int]] | None = None
    overflows: bool = False

    @property
    def setting(self) -> Setting:
        activation: Activation = ClampedSwiGLU(1.7, 0.9) if self.bias else "silu"
        return Setting(activation, self.execution, self.placement)


def _exchanged(dispatch, execution, placement=None, **options) -> Case:
    """Tokens alternate between the copies of an expert, or go to all of its slices."""
    table = placement or Placement.contiguous(MANY, execution.num_shards("E"))

    def sent_to(expert: int, token: int) -> list[int]:
        copies = table.replicas[expert * table.slices : (expert + 1) * table.slices]
        return [places[token % len(places)][0] for places in copies]

    return Case(dispatch, execution, placement, sent_to=sent_to, overflows=dispatch.capacity is not None, **options)


def dense():
    return {
        "one device": Case(Dense(), bias=True),
        "partitioned by the compiler": Case(Dense(), FLAT),
        "copies": Case(Dense(), placement=SHUFFLED, bias=True),
        "slices": Case(Dense(), placement=FOURTHS, num_experts=FEW, bias=True),
    }


def sorted():
    return {
        "one device": Case(Sorted()),
        "copies": Case(Sorted(), placement=SHUFFLED, bias=True),
        "slices": Case(Sorted(), placement=FOURTHS, num_experts=FEW, bias=True),
        "features split": Case(Sorted(), FEATURES_SPLIT, bias=True),
    }


def all_to_all():
    return {
        "one axis": _exchanged(AllToAll(), FLAT),
        "one at a time": _exchanged(AllToAll(1), FLAT, bias=True),
        "copies": _exchanged(AllToAll(2), FLAT, SHUFFLED, bias=True),
        "slices": _exchanged(AllToAll(), FLAT, HALVES, bias=True),
        "two axes": _exchanged(AllToAll(2), NODES),
        "features split": _exchanged(AllToAll(4), BOTH, bias=True),
    }


def hierarchical():
    return {
        "two axes": _exchanged(Hierarchical(), NODES),
        "one at a time": _exchanged(Hierarchical(1), NODES, SHUFFLED, bias=True),
    }


def gather_scatter():
    return {
        "one axis": Case(GatherScatter(), FLAT, bias=True),
        "copies": Case(GatherScatter(), NODES, SHUFFLED),
        "features split": Case(GatherScatter(), BOTH, bias=True),
        "slices": Case(GatherScatter(), FLAT, FOURTHS, FEW, bias=True),
    }


def sliced():
    """Two experts in four slices each; of these, `degree` are computed with separately."""

    def exchanged(dispatch: Sliced, degree: int, **options) -> Case:
        def sent_to(expert: int, token: int) -> list[int]:
            together = 4 // degree
            return [expert * 4 + index * together + token % together for index in range(degree)]

        return Case(dispatch, FLAT, FOURTHS, FEW, sent_to=sent_to, **options)

    return {
        # Each device has two tokens, which alternate between the devices of an expert.
        "degree 2": exchanged(Sliced(2, 1), 2, bias=True),
        "degree 4": exchanged(Sliced(4, 1), 4, bias=True, overflows=True),
        "degree 1": exchanged(Sliced(1), 1, bias=True),
        "degree chosen": exchanged(Sliced(), 4),
        "degree 0": Case(Sliced(0), FLAT, FOURTHS, FEW, bias=True),
        "more experts, gathered": Case(Sliced(0), FLAT, bias=True),
    }
