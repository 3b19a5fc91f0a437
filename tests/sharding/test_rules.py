"""Weights split over a mesh give the tokens that they give on one device, and what cannot be split says so."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from safetensors.numpy import load_file, save_file

import decodax
from decodax.layers.weight import Weight
from decodax.sharding.rules import RULES, TENSOR, Rules, place


@pytest.fixture(scope="module")
def even_llama(tmp_path_factory):
    """The tiny Llama of the golden files, cut so that vocabulary and feed-forward divide by two."""
    source, folder = Path(__file__).parents[1] / "golden" / "llama", tmp_path_factory.mktemp("even")
    config = json.loads((source / "config.json").read_text())
    config |= {"vocab_size": 66, "intermediate_size": 40}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if "embed" in name or "lm_head" in name:
            tensors[name] = tensor[:66]
        elif "gate" in name or "up_proj" in name:
            tensors[name] = tensor[:40]
        elif "down" in name:
            tensors[name] = np.ascontiguousarray(tensor[:, :40])
    save_file(tensors, folder / "model.safetensors")
    return folder


def mesh_of(size, kind):
    return jax.make_mesh((size,), ("tensor",), axis_types=(kind,), devices=jax.devices()[:size])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_same_tokens_as_on_one_device(kind, even_llama):
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8, 9]]
    single = decodax.load(even_llama)
    split = decodax.load(even_llama, mesh=mesh_of(2, kind))
    assert split.params["blocks_0"]["mixer"]["query"].sharding.spec == PartitionSpec("tensor", None)
    assert split.params["blocks_0"]["mixer"]["out"].sharding.spec == PartitionSpec(None, "tensor")
    for options in ({}, {"temperature": 0.9, "top_p": 0.8, "seed": 5}):
        one, two = (
            decodax.generate(lm, prompts, max_new_tokens=9, stop_token_ids=[], **options) for lm in (single, split)
        )
        np.testing.assert_array_equal(one.tokens, two.tokens)


def test_what_cannot_be_split_is_named():
    mesh = mesh_of(2, AxisType.Auto)
    weight = Weight(("F", "D"), (29, 23))
    with pytest.raises(ValueError, match="feed_forward/up: its axis F of 29 does not divide over the 2 devices"):
        place(mesh, TENSOR, np.zeros((29, 23), np.float32), weight, "blocks_0/feed_forward/up")
    both = Rules((("F", "tensor"), ("D", "tensor")))
    with pytest.raises(ValueError, match="would use a mesh axis twice"):
        both.sharding(mesh, Weight(("F", "D"), (4, 4)), "up")
    with pytest.raises(ValueError, match="each letter needs one mesh axis"):
        Rules((("F", "tensor"), ("F", "data")))


def test_heads_are_not_parted():
    """Twelve numbers divide over four devices, three heads do not."""
    mesh = mesh_of(4, AxisType.Auto)
    with pytest.raises(
        ValueError, match="query: its axis N of 3 does not divide over the 4 devices of mesh axis tensor"
    ):
        TENSOR.sharding(mesh, Weight(("NH", "D"), (12, 5), whole=4), "query")
    with pytest.raises(ValueError, match="does not divide into wholes of 5"):
        Weight(("NH", "D"), (12, 5), whole=5)


def test_key_value_heads_are_split_as_far_as_they_divide():
    axes = {"data": 2, "tensor": 2, "tensor_copies": 2}
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * 3)
    for heads, split in ((1, None), (2, "tensor"), (4, ("tensor", "tensor_copies")), (6, "tensor"), (3, None)):
        key = Weight(("KH", "D"), (heads * 5, 7), whole=5)
        assert RULES.sharding(mesh, key, "key").spec == PartitionSpec(split, None)
    assert RULES.mesh_axes(mesh, "B", 3) == () and RULES.mesh_axes(mesh, "B", 6) == ("data",)


def test_rules_combine():
    rows_and_heads = Rules((("B", "data"),)) | Rules((("N", "tensor"), ("B", ("data", "expert"))))
    assert rows_and_heads.pairs == (("B", ("data", "expert")), ("N", ("tensor",)))


def test_axes_that_the_mesh_lacks_are_replicated():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    assert TENSOR.sharding(mesh, Weight(("F", "D"), (29, 23)), "up").spec == PartitionSpec(None, None)
