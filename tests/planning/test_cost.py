"""The roofline equals hand calculation: what is added, what overlaps, and what limits."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from decodax.planning.chips import GPUS, H200, TPUS, V5E
from decodax.planning.cost import LIMITS, cost
from decodax.planning.network import Ring
from decodax.planning.topology import Topology
from decodax.planning.work import Collective, CostItem
from decodax.sharding.topologies import tpu_devices

RINGS = {"tensor": (Ring(4, False), Ring(4, False))}
SUM = Collective("all-reduce", ("tensor",), 1.0)  # 12 hops of a microsecond


def item(flops=0.0, weights=0.0, cache=0.0, *, ahead=True, count=1, sums=0):
    return CostItem("item", count, flops, weights, cache, 0.0, (SUM,) * sums, ahead)


def test_weights_are_fetched_while_devices_wait():
    """Two layers whose weights take 100 us each: the 24 us of all-reduces are hidden."""
    found = cost([item(weights=819e9 * 100e-6, sums=1, count=2)], V5E, RINGS)
    assert found.total == pytest.approx(200e-6) and found.limit == "reading weights"
    assert found.hidden["network"] == pytest.approx(24e-6)
    (sums,) = found.collectives
    assert (sums.kind, sums.axes, sums.count) == ("all-reduce", ("tensor",), 2)


def test_all_reduces_that_take_longer_than_weights():
    found = cost([item(weights=819e9 * 5e-6, cache=819e9 * 3e-6, sums=1)], V5E, RINGS)
    assert found.total == pytest.approx(15e-6) and found.limit == "collectives between chips"
    assert found.seconds["cache"] == pytest.approx(3e-6) and found.hidden["weights"] == pytest.approx(5e-6)


def test_weights_of_experts_wait_for_the_router():
    """Their weights cannot be fetched before routing, and wait for the all-reduce."""
    early, late = (cost([item(weights=819e9 * 5e-6, sums=1, ahead=ahead)], V5E, RINGS).total for ahead in (True, False))
    assert (early, late) == (pytest.approx(12e-6), pytest.approx(17e-6))


def test_a_gpu_prefetches_no_weights():
    ring = {"tensor": (H200.network.ring(8, True),)}
    took = H200.network.seconds("all-reduce", 1.0, ring["tensor"])
    found = cost([item(weights=4.8e12 * 50e-6, sums=1)], H200, ring)
    assert found.total == pytest.approx(50e-6 + took) and not found.hidden


def test_an_item_takes_the_longer_of_arithmetic_and_bytes():
    flops = 197e12 * 30e-6
    assert cost([item(flops, weights=819e9 * 20e-6)], V5E, {}).total == pytest.approx(30e-6)
    both = [item(H200.bf16_flops * 30e-6), item(weights=4.8e12 * 20e-6)]
    found = cost(both, H200, {})
    assert found.total == pytest.approx(50e-6) and found.limit == "arithmetic"
    assert set(found.seconds) == set(LIMITS) and sum(found.seconds.values()) == pytest.approx(found.total)


@pytest.mark.parametrize("chip", [*TPUS.values(), *GPUS.values()], ids=lambda chip: chip.name)
def test_chips_make_sense(chip):
    """Catches a data sheet misread by a factor of 2 or of 8 (bits for bytes)."""
    assert chip.int8_ops == pytest.approx(2 * chip.bf16_flops, rel=0.01)
    assert 0.9 * chip.memory_bytes < chip.usable_bytes < 1.01 * chip.memory_bytes
    assert 150 < chip.bf16_flops / chip.memory_bandwidth < 600  # operations per byte
    network = dataclasses.asdict(chip.network)
    one_way = network.get("link_bandwidth", network.get("bandwidth"))
    assert 5 < chip.memory_bandwidth / one_way < 30


@pytest.mark.parametrize("chip", TPUS)
def test_libtpu_gives_as_much_memory(chip):
    """From libtpu's error for a program that is too large."""
    pytest.importorskip("libtpu", reason="asking libtpu needs it (Linux on x86-64)")
    slice_of_four = next(shape for shape in TPUS[chip].slices if np.prod(shape) == 4)
    device = np.array(tpu_devices(Topology(TPUS[chip], slice_of_four).name)[:1])
    place = NamedSharding(Mesh(device, ("one",)), PartitionSpec())
    large = jax.ShapeDtypeStruct((120 * 2**30,), jnp.int8, sharding=place)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as error:
        jax.jit(lambda array: array + 1).lower(large).compile()
    said = re.search(r"available HBM \(([\d.]+)G\)", str(error.value))
    assert said is not None and float(said[1]) == pytest.approx(TPUS[chip].usable_bytes / 2**30, abs=0.005)
