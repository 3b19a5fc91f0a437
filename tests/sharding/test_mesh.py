"""Meshes are read from text and fitted to a model's key-value heads; bad meshes are refused."""

import jax
import numpy as np
import pytest

from decodax.models.key_value_copies import fit_mesh
from decodax.sharding.mesh import read_mesh, read_mesh_shape
from decodax.sharding.rules import MESH_AXES, RULES
from tests.model_kinds import model_of as small_model
from tests.sharding import wide


def test_text():
    mesh = read_mesh(" tensor=2, data=4 ")
    assert dict(mesh.shape) == {"data": 4, "tensor": 2}
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))
    assert list(read_mesh_shape("tensor=1,expert=2,context=3,pipeline=4,data=5")) == list(MESH_AXES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor=16", "needs 16 devices, and there are 8 cpu devices: set JAX_NUM_CPU_DEVICES=16"),
        ("tensor", "must be a whole number from 1 on, got 'tensor'"),
        ("tensor=0,data=8", "must be a whole number from 1 on, got 'tensor=0'"),
        ("tensor=2,tensor=4", "names the axis tensor twice"),
        ("model=8", "a mesh has axes data, pipeline, context, expert, tensor, as in tensor=4,data=2; got 'model=8'"),
        ("", "got ''"),
    ],
)
def test_bad_meshes_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_mesh(text)


def test_one_device_less():
    with pytest.raises(ValueError, match="needs 2 devices, and there is 1 cpu device:"):
        read_mesh("data=2", jax.devices()[:1])
    with pytest.raises(ValueError, match="needs 3 devices, and there are 2 cpu devices"):
        read_mesh("data=3", jax.devices()[:2])


def test_key_value_heads_fewer_than_devices_are_copied():
    """Eight query heads read two key-value heads: each device has the one of its query head."""
    model = wide.model_of("dense")
    mesh = fit_mesh(read_mesh("tensor=8"), model.config)
    assert dict(mesh.shape) == {"tensor": 2, "tensor_copies": 4}
    np.testing.assert_array_equal(mesh.devices.reshape(-1), read_mesh("tensor=8").devices)
    params = wide.params_of("dense", "tensor=8")["blocks_0"]["mixer"]
    heads = {
        name: {shard.device: shard.index[0].start // 6 for shard in params[name].addressable_shards}
        for name in ("query", "key")
    }
    assert heads["key"] == {device: head // 4 for device, head in heads["query"].items()}


def test_a_mesh_that_fits_stays():
    mesh = read_mesh("data=4,tensor=2")
    assert fit_mesh(mesh, wide.model_of("dense").config) == mesh
    assert fit_mesh(read_mesh("data=8"), wide.model_of("dense").config) == read_mesh("data=8")


def test_an_axis_without_anything_to_split_names_what_is_missing():
    described = small_model("moe").config.weights()["blocks_1"]["mixer"]["query"]
    with pytest.raises(ValueError, match="query: its axis N of 2 query heads does not divide over the 8 devices"):
        RULES.sharding(read_mesh("tensor=8"), described, "query")
