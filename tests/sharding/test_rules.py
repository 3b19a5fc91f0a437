"""Weights sharded over a mesh give one device's tokens; weights that cannot be sharded are refused by name."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from safetensors.numpy import load_file

import decodax
from decodax.cli.session import describe
from decodax.core.weight import Weight
from decodax.models.checkpoints.write_hf import to_hf
from decodax.models.checkpoints.write_orbax import from_hf
from decodax.sharding.rules import RULES, TENSOR, Rules, place

LLAMA = Path(__file__).parents[1] / "golden" / "llama"  # 67 tokens, feed-forward 41: two devices have 68 and 42


def mesh_of(size, kind):
    return jax.make_mesh((size,), ("tensor",), axis_types=(kind,), devices=jax.devices()[:size])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.slow
def test_same_tokens_as_on_one_device(kind):
    """And the same log-probabilities, though vocabulary and feed-forward are padded for sharding."""
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8, 9]]
    single, split = decodax.load(LLAMA), decodax.load(LLAMA, mesh=mesh_of(2, kind))
    assert split.params["blocks_0"]["mixer"]["query"].sharding.spec == PartitionSpec("tensor", None)
    assert split.params["blocks_0"]["mixer"]["out"].sharding.spec == PartitionSpec(None, "tensor")
    assert split.params["head"].addressable_shards[0].data.shape == (34, 30)
    for options in ({}, {"temperature": 0.9, "top_p": 0.8, "top_k": 31, "seed": 5}):
        one, two = (
            decodax.generate(lm, prompts, max_new_tokens=9, stop_token_ids=[], **options) for lm in (single, split)
        )
        np.testing.assert_array_equal(one.tokens, two.tokens)
        np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-4)


def test_padding_is_invisible(tmp_path):
    """Neither in logits, nor in sizes, nor in what is converted."""
    single, split = decodax.load(LLAMA), decodax.load(LLAMA, mesh=mesh_of(2, AxisType.Auto))
    assert split.params["embedding"].shape == (68, 30) and not np.asarray(split.params["embedding"])[67].any()
    assert split.params["blocks_1"]["feed_forward"]["down"].shape == (30, 42)
    assert decodax.logits(split, np.array([[1, 2, 3]])).shape == (1, 3, 67)
    assert split.nbytes == single.nbytes and describe(split) == describe(single)
    jax.tree.map(np.testing.assert_array_equal, split.model.unstacked(split.params), single.params)
    held = split.model.stacked(single.params)
    for leaf, wanted in zip(jax.tree.leaves(held), jax.tree.leaves(split.params), strict=True):
        np.testing.assert_array_equal(leaf, wanted)
    assert held["embedding"].sharding == split.params["embedding"].sharding
    to_hf(split, tmp_path / "hf")
    written, stored = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", LLAMA))
    assert written.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(written[name], tensor)


def test_orbax_cut_for_a_mesh_that_pads(tmp_path):
    from_hf(LLAMA, tmp_path / "orbax", mesh=mesh_of(2, AxisType.Auto))
    read = decodax.load(tmp_path / "orbax", mesh=mesh_of(3, AxisType.Auto))
    assert read.params["embedding"].shape == (69, 30)
    jax.tree.map(np.testing.assert_array_equal, read.model.unstacked(read.params), decodax.load(LLAMA).params)


def test_padding_is_zeros():
    """Five rows over four devices: two each; the third has one and the last none."""
    mesh, array = mesh_of(4, AxisType.Auto), np.arange(1.0, 16, dtype=np.float32).reshape(5, 3)
    for axis_name in "VF":
        placed = place(mesh, TENSOR, array, Weight((axis_name, "D"), (5, 3)), "up")
        assert placed.shape == (8, 3) and placed.addressable_shards[0].data.shape == (2, 3)
        np.testing.assert_array_equal(np.asarray(placed), np.pad(array, [(0, 3), (0, 0)]))
    assert TENSOR.padded(mesh, Weight(("D", "F"), (3, 5))).shape == (3, 8)
    assert TENSOR.padded(mesh, Weight(("F", "D"), (8, 3))).shape == (8, 3)


def test_a_device_may_hold_padding_alone():
    """Of 41 features over eight devices each has six, and the last none."""
    mesh, rules = Mesh(jax.devices(), ("own",)), Rules((("V", "own"), ("F", "own")))
    read = decodax.load(LLAMA, mesh=mesh, rules=rules)
    assert read.params["blocks_0"]["feed_forward"]["down"].shape == (30, 48) and read.params["head"].shape == (72, 30)
    jax.tree.map(np.testing.assert_array_equal, read.model.unstacked(read.params), decodax.load(LLAMA).params)


@pytest.mark.parametrize("num_devices", [2, 4, 8])
@pytest.mark.parametrize("vocab_size", [131, 32_000, 32_001, 49_155, 50_257])
def test_published_vocabularies_are_padded_to_the_next_multiple(vocab_size, num_devices):
    padded = TENSOR.padded(mesh_of(num_devices, AxisType.Auto), Weight(("V", "D"), (vocab_size, 7))).shape
    assert padded == (-(-vocab_size // num_devices) * num_devices, 7)


def test_other_shapes_than_the_padded_one_are_refused():
    split = decodax.load(LLAMA, mesh=mesh_of(2, AxisType.Auto))
    params = split.params | {"embedding": np.zeros((69, 30), np.float32)}
    with pytest.raises(ValueError, match=r"weight embedding must have shape \(67, 30\).*got \(69, 30\)"):
        split.model.embed(params, jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32))


def test_axes_that_cannot_be_sharded_are_named():
    mesh = mesh_of(2, AxisType.Auto)
    with pytest.raises(ValueError, match="experts/up: its axis E of 5 experts does not divide over the 2 devices"):
        place(mesh, Rules((("E", "tensor"),)), np.zeros((5, 7, 3)), Weight(("E", "F", "D"), (5, 7, 3)), "experts/up")
    both = Rules((("F", "tensor"), ("D", "tensor")))
    with pytest.raises(ValueError, match="would use a mesh axis twice"):
        both.sharding(mesh, Weight(("F", "D"), (4, 4)), "up")
    with pytest.raises(ValueError, match="pairs must name each logical axis once"):
        Rules((("F", "tensor"), ("F", "data")))


def test_heads_are_not_split():
    """Twelve numbers divide over four devices, three heads do not."""
    mesh = mesh_of(4, AxisType.Auto)
    with pytest.raises(
        ValueError, match="query: its axis N of 3 query heads does not divide over the 4 devices of mesh axis tensor"
    ):
        TENSOR.sharding(mesh, Weight(("NH", "D"), (12, 5), block_size=4), "query")
    with pytest.raises(ValueError, match="does not divide into blocks of 5"):
        Weight(("NH", "D"), (12, 5), block_size=5)


def test_key_value_heads_are_sharded_up_to_their_divisors():
    axes = {"data": 2, "tensor": 2, "tensor_copies": 2}
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * 3)
    for heads, split in ((1, None), (2, "tensor"), (4, ("tensor", "tensor_copies")), (6, "tensor"), (3, None)):
        key = Weight(("KH", "D"), (heads * 5, 7), block_size=5)
        assert RULES.sharding(mesh, key, "key").spec == PartitionSpec(split, None)
    assert RULES.mesh_axes(mesh, "B", 3) == () and RULES.mesh_axes(mesh, "B", 6) == ("data",)


def test_rules_combine():
    rows_and_heads = Rules((("B", "data"),)) | Rules((("N", "tensor"), ("B", ("data", "expert"))))
    assert rows_and_heads.pairs == (("B", ("data", "expert")), ("N", ("tensor",)))


def test_axes_that_the_mesh_lacks_are_replicated():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    assert TENSOR.sharding(mesh, Weight(("F", "D"), (29, 23)), "up").spec == PartitionSpec(None, None)
