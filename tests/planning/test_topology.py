"""Topologies: names of slices, what libtpu knows of them, and how mesh axes map to the torus."""

import numpy as np
import pytest

from decodax.planning.chips import GPUS, TPUS
from decodax.planning.network import Ring
from decodax.planning.topology import Topology, parse_topology
from decodax.sharding.mesh import read_mesh
from decodax.sharding.topologies import tpu_devices


@pytest.mark.parametrize(
    ("name", "chips"), [("v5e:4x4", 16), ("v6e:16x16", 256), ("v5p:4x4x8", 128), ("gpu:h200x8", 8)]
)
def test_names(name, chips):
    topology = parse_topology(name)
    assert topology.name == name and topology.num_chips == chips


@pytest.mark.parametrize(
    "name", ["v9:2x2", "banana", "v5e:", "v5e:3x3", "gpu:h200x9", "gpu:h900x8", "v5e:2x-2", "gpu:", ""]
)
def test_a_wrong_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="know no topology") as error:
        parse_topology(name)
    for chip in (*TPUS.values(), *GPUS.values()):
        for shape in chip.slices:
            assert Topology(chip, shape).name in str(error.value)


def test_a_slice_with_its_sides_in_another_order():
    with pytest.raises(ValueError, match="the shorter sides come first, v5e:2x4"):
        parse_topology("v5e:4x2")


def num_known_to_libtpu(name):
    pytest.importorskip("libtpu", reason="asking libtpu needs it (Linux on x86-64)")
    return len(tpu_devices(name))


@pytest.mark.parametrize("chip", TPUS)
def test_libtpu_knows_the_smallest_slices(chip):
    for shape in TPUS[chip].slices[:4]:
        topology = Topology(TPUS[chip], shape)
        assert num_known_to_libtpu(topology.name) == topology.num_chips


@pytest.mark.slow
@pytest.mark.parametrize("chip", TPUS)
def test_libtpu_knows_all_of_them(chip):
    for shape in TPUS[chip].slices:
        topology = Topology(TPUS[chip], shape)
        assert num_known_to_libtpu(topology.name) == topology.num_chips


def test_libtpu_refuses_unknown_topologies():
    pytest.importorskip("libtpu", reason="asking libtpu needs it (Linux on x86-64)")
    with pytest.raises(ValueError, match="libtpu knows no topology 'v9:2x2'"):
        tpu_devices("v9:2x2")


def test_axes_of_a_mesh_take_whole_axes_of_the_torus():
    v5p, v5e = parse_topology("v5p:4x4x8"), parse_topology("v5e:4x4")
    four, eight = Ring(4, True), Ring(8, True)
    assert v5p.rings({"expert": 16, "tensor": 8}) == {"tensor": (eight,), "expert": (four, four)}
    assert v5p.rings({"tensor": 128}) == {"tensor": (four, four, eight)}
    assert v5p.rings({"data": 8, "tensor": 16}) == {"tensor": (four, four), "data": (eight,)}
    # A stretch of an axis is a line, even where the whole axis is a ring; and two axes are better than one.
    half = Ring(2, False)
    assert v5p.rings({"data": 2, "tensor": 64}) == {"tensor": (eight, four, half), "data": (half,)}
    rest = (four, Ring(4, False))
    assert v5p.rings({"data": 16, "tensor": 2, "expert": 4}) == {"expert": (four,), "tensor": (half,), "data": rest}
    flat = Topology(TPUS["v5p"], (2, 2, 4))
    assert flat.rings({"data": 4, "tensor": 4}) == {"tensor": (Ring(2, False),) * 2, "data": (four,)}
    line = Ring(4, False)
    assert v5e.rings({"tensor": 16}) == {"tensor": (line, line)}
    # Eight of 4 x 4: an axis, and half of the other, whose other half is for data.
    assert v5e.rings({"data": 2, "tensor": 8}) == {"tensor": (line, Ring(2, False)), "data": (Ring(2, False),)}


def test_larger_slices_grow():
    sizes = [topology.num_chips for topology in parse_topology("v5e:2x4").larger]
    assert sizes == [16, 32, 64, 128, 256]


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("v5e:2x4", "tensor=8"),
        ("v5e:4x4", "tensor=16"),
        ("v5e:4x4", "tensor=4,data=4"),
        ("v5e:4x4", "tensor=8,data=2"),
        ("v5p:4x4x8", "tensor=8,expert=16"),
        ("v5p:4x4x8", "tensor=16,expert=8"),
        ("v5p:4x4x8", "tensor=64,data=2"),
    ],
)
def test_the_compiled_mesh_maps_to_the_torus_as_the_cost_model_assumes(name, mesh):
    """The chips along each mesh axis have as many different coordinates along each axis of the torus."""
    pytest.importorskip("libtpu", reason="asking libtpu needs it (Linux on x86-64)")
    found = read_mesh(mesh, tpu_devices(name))
    expected = parse_topology(name).rings(dict(found.shape))
    for index, axis in enumerate(found.axis_names):
        along = np.moveaxis(found.devices, index, 0).reshape(found.shape[axis], -1)[:, 0]
        places = np.array([device.coords for device in along])
        lengths = [len(set(column)) for column in places.T]
        assert sorted(length for length in lengths if length > 1) == sorted(ring.length for ring in expected[axis])
