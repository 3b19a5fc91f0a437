"""Galvatron's dynamic programme finds what trying everything finds."""

import itertools

import numpy as np
import pytest

from decodax.sharding.plan.layerwise import Choice, cheapest_layouts, layout_per_layer
from decodax.sharding.plan.memory import Workload
from decodax.sharding.plan.search import best_plans
from decodax.sharding.plan.topology import parse_topology
from tests.sharding.plan.published import config_of


def tried(layers, conversion, memory_bytes):
    """(seconds, bytes) of the best of all combinations, None if none fits."""
    found = []
    for layouts in itertools.product(*(range(len(layer)) for layer in layers)):
        num_bytes = sum(layer[s].num_bytes for layer, s in zip(layers, layouts, strict=True))
        seconds = sum(layer[s].seconds for layer, s in zip(layers, layouts, strict=True))
        seconds += sum(conversion[a][b] for a, b in itertools.pairwise(layouts))
        if num_bytes <= memory_bytes:
            found.append((seconds, num_bytes))
    return min(found, default=None)


@pytest.mark.parametrize("seed", range(12))
def test_as_good_as_trying_everything(seed):
    random = np.random.default_rng(seed)
    num_layers, num_layouts = 5, 3
    layers = [
        [Choice(float(random.integers(1, 20)), int(random.integers(1, 30))) for _ in range(num_layouts)]
        for _ in range(num_layers)
    ]
    conversion = random.integers(0, 9, (num_layouts, num_layouts)).astype(float).tolist()
    for memory_bytes in (10, 40, 60, 80, 200):
        expected = tried(layers, conversion, memory_bytes)
        found = cheapest_layouts(layers, lambda s, t: conversion[s][t], memory_bytes)
        assert (found is None) == (expected is None)
        if found is None or expected is None:
            continue
        assert (found.seconds, found.num_bytes) == pytest.approx(expected)
        # What is said of the layouts is what they cost.
        own = [layer[s] for layer, s in zip(layers, found.layouts, strict=True)]
        between = sum(conversion[a][b] for a, b in itertools.pairwise(found.layouts))
        assert found.seconds == pytest.approx(sum(choice.seconds for choice in own) + between)
        assert found.num_bytes == sum(choice.num_bytes for choice in own)


def test_memory_forces_a_mixture():
    """Two of four layers may have the fast layout that is three times as large."""
    layers = [[Choice(1.0, 3), Choice(2.0, 1)]] * 4
    found = cheapest_layouts(layers, lambda s, t: 0.0, 8)
    assert found is not None and sorted(found.layouts) == [0, 0, 1, 1] and found.seconds == 6


def test_no_layers():
    with pytest.raises(ValueError, match="at least one layer"):
        cheapest_layouts([], lambda s, t: 0.0, 1)


def test_a_layout_per_layer_is_never_slower_than_one_for_all():
    config = config_of("DeepSeek-V3", num_hidden_layers=7)
    plans = best_plans(config, parse_topology("v5p:2x2x1"), Workload(8, 2048))
    found = layout_per_layer(plans[:4])
    assert found is not None and len(found.meshes) == 7
    assert found.seconds <= found.seconds_with_one * (1 + 1e-9)
