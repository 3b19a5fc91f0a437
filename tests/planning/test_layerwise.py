"""Galvatron's dynamic programme finds the optimum of exhaustive search."""

import itertools

import numpy as np
import pytest

from decodax.planning.layerwise import Choice, cheapest_layouts, layout_per_layer
from decodax.planning.memory import Workload
from decodax.planning.search import best_plans, plan_for
from decodax.planning.topology import parse_topology
from tests.planning.published import config_of


def tried(layers, conversion, memory_bytes):
    """(seconds, bytes) of the best of all combinations; None if none fits."""
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
        # The reported cost is that of the layouts.
        own = [layer[s] for layer, s in zip(layers, found.layouts, strict=True)]
        between = sum(conversion[a][b] for a, b in itertools.pairwise(found.layouts))
        assert found.seconds == pytest.approx(sum(choice.seconds for choice in own) + between)
        assert found.num_bytes == sum(choice.num_bytes for choice in own)


def test_memory_forces_a_mixture():
    """Two of four layers may have the fast layout, which is three times as large."""
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


def test_caches_have_to_fit_too():
    """Four layers on eight chips of 15.75 GiB; weights and temporaries take 1.6 GiB at 48 rows and 2 GiB at 64.

    A row of 131,072 tokens has keys and values of one of eight heads, 128 numbers of two bytes, on each chip: 256 MiB
    in four layers. 48 rows take 12 GiB, 64 take 16 GiB.
    """
    config, topology = config_of("Llama-3.1-8B", num_hidden_layers=4), parse_topology("v5e:2x4")
    plans = {rows: plan_for(config, topology, Workload(rows, 131_072), {"tensor": 8}) for rows in (48, 64)}
    assert 2 * 131_072 * 128 * 2 * 4 == 2**28
    assert plans[64].memory.weights + plans[64].memory.temporaries < 2 * 2**30
    found = layout_per_layer([plans[48]])
    assert found is not None and found.meshes == ("tensor=8",) * 4
    assert layout_per_layer([plans[64]]) is None


def test_each_layout_has_the_cache_of_its_own_mesh():
    """One key-value head: tensor=8 keeps a copy on each chip, 4 GiB a layer at 64 rows, and data=8 an eighth of it."""
    config, topology = config_of("Llama-3.1-8B", num_hidden_layers=4, num_key_value_heads=1), parse_topology("v5e:2x4")
    plans = [plan_for(config, topology, Workload(64, 131_072), sizes) for sizes in ({"tensor": 8}, {"data": 8})]
    found = layout_per_layer(plans)
    assert found is not None and found.meshes == ("data=8",) * 4
    assert layout_per_layer(plans[:1]) is None
