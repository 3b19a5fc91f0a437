"""Errors for a mesh that does not fit a model name the problem and the meshes that would work."""

import json
import math

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh

import decodax
from decodax.models.configs.hf_config import load_config
from decodax.models.mesh_fitting import mesh_for, suitable_meshes, unsupported_reason
from decodax.sharding.mesh import IdleDevicesWarning
from decodax.sharding.rules import DATA, Rules
from tests.golden_files import load_golden
from tests.sharding import wide

DEVICES = jax.devices()
SMOLLM2_135M = {  # its sizes
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
MODEL = Rules((("N", "model"), ("K", "model"), ("F", "model"), ("V", "model")))


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm")
    (folder / "config.json").write_text(json.dumps(SMOLLM2_135M))
    return load_config(folder)[1]


@pytest.mark.parametrize("mesh", ["tensor=8", "tensor=4,data=2", "tensor=2,context=4"])
def test_heads_that_do_not_divide_name_the_meshes_that_would_work(mesh, smollm):
    with pytest.raises(ValueError) as error:
        mesh_for(mesh, smollm)
    degree = mesh[len("tensor=")]
    assert f"query: its axis N of 9 query heads does not divide over the {degree} devices of mesh axis tensor" in str(
        error.value
    )
    assert str(error.value).endswith(
        "Of these 8 devices these meshes would work: data=8; tensor=3,data=2 with 6 of them"
    )


def test_the_meshes_that_are_named_work(smollm):
    """Of any number of devices; each is as large as it can be."""
    for num_devices in (1, 2, 3, 7, 9, 20):
        meshes = suitable_meshes(smollm, num_devices, ("tensor", "data"))
        assert meshes
        for sizes in meshes:
            assert unsupported_reason(smollm, sizes) is None
            rest = math.prod(size for axis, size in sizes.items() if axis != "data")
            assert sizes.get("data", 1) == num_devices // rest
    assert suitable_meshes(smollm, 9, ("tensor",))[:2] == [{"tensor": 9}, {"data": 3, "tensor": 3}]
    experts = wide.model_of("moe").config  # eight, and eight heads
    assert {"expert": 4, "tensor": 2} in suitable_meshes(experts, 8, ("expert", "tensor"))
    assert "expert" not in str(suitable_meshes(smollm, 8, ("expert",)))
    assert unsupported_reason(experts, {"expert": 3}) is not None


def test_key_value_heads_do_not_limit_the_mesh(smollm):
    """Three are copied over three devices each."""
    mesh = Mesh(np.asarray(DEVICES[:6]).reshape(2, 3), ("data", "tensor"))
    assert mesh_for(mesh, smollm).shape == {"data": 2, "tensor": 3}
    assert unsupported_reason(smollm, {"tensor": 9}) is None


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (Mesh(DEVICES, ("model",)), r"no rule splits anything over the mesh axis model \(of 8\)"),
        (Mesh(np.asarray(DEVICES).reshape(2, 4), ("dp", "tp")), r"mesh axis dp \(of 2\), tp \(of 4\)"),
        (Mesh(np.asarray(DEVICES).reshape(2, 4), ("data", "tp")), r"name the axes of the mesh data, pipeline, context"),
        (Mesh(np.asarray([]), ("tensor",)), "needs at least one device"),
        (Mesh(np.asarray([[]]), ("data", "tensor")), "needs at least one device"),
        (Mesh([DEVICES[0], DEVICES[1], DEVICES[0]], ("tensor",)), "hold each device once, got .* 2 times"),
        (DEVICES, "a jax.sharding.Mesh or None, got list"),
        ({"tensor": 8}, "a jax.sharding.Mesh or None, got dict"),
        (8, "got int"),
        (AbstractMesh((8,), ("tensor",)), "got AbstractMesh"),
        ("", "a mesh has axes data, pipeline"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_meshes_that_do_not_fit_a_model_are_refused(mesh, message):
    with pytest.raises(ValueError, match=message):
        mesh_for(mesh, wide.model_of("dense").config)


def test_loading_refuses_an_axis_that_nothing_is_split_over():
    with pytest.raises(ValueError, match="no rule splits anything over the mesh axis model"):
        decodax.load(load_golden("llama").folder, mesh=Mesh(DEVICES, ("model",)))


def test_valid_axes_pass(smollm):
    config = wide.model_of("dense").config
    one = Mesh(np.asarray(DEVICES).reshape(8, 1), ("tensor", "model"))
    assert mesh_for(one, config).shape["model"] == 1
    assert mesh_for(Mesh(DEVICES, ("model",)), config, MODEL).shape == {"model": 8}
    assert mesh_for(Mesh(DEVICES, ("tensor",)), config, DATA).shape["tensor"] == 2  # copies that were asked for
    assert mesh_for(Mesh(np.asarray(DEVICES[0]), ()), config).size == 1
    with pytest.raises(ValueError, match="does not divide over the 8 devices of mesh axis model") as error:
        mesh_for(Mesh(DEVICES, ("model",)), smollm, MODEL)
    assert "would work" not in str(error.value)  # those are named for the rules that every mesh text goes by


def test_a_text_may_use_some_of_the_devices(smollm):
    with pytest.warns(IdleDevicesWarning, match="the mesh 'tensor=3,data=2' leaves 2 of 8 cpu devices idle"):
        mesh = mesh_for("tensor=3,data=2", smollm)
    assert mesh.shape == {"data": 2, "tensor": 3} and list(mesh.devices.flat) == DEVICES[:6]
    assert mesh_for("data=8", smollm).size == 8  # without a warning, which would be an error here
