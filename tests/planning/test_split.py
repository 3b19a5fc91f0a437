"""Bytes per chip equal hand calculation for Llama-3.1-8B, and real arrays on eight devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import decoding
from decodax.core.weight import Weight
from decodax.layers.execution import Execution
from decodax.models.key_value_copies import fit_mesh
from decodax.planning.split import Split
from decodax.sharding.mesh import read_mesh
from decodax.sharding.rules import RULES, place
from tests.model_kinds import LAYERS, model_of, params_of
from tests.planning.published import config_of


def test_llama_8b_by_hand():
    """Each of 8 chips has a shard of every matrix, and all norms; one key-value head of the cache."""
    config, split = config_of("Llama-3.1-8B"), Split.of(config_of("Llama-3.1-8B"), {"tensor": 8})
    matrices = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336) + 2 * 128256 * 4096
    norms = (2 * 32 + 1) * 4096
    assert split.weight_bytes(config.weights(), "bfloat16") == 2 * (matrices // 8 + norms)
    # int8: embedding and head stay; each output has a scale of 2 bytes, on the devices that have the output.
    in_layers = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336) // 8
    scales = 32 * ((4096 + 2 * 1024 + 2 * 14336) // 8 + 2 * 4096)
    expected = in_layers + 2 * scales + 2 * (2 * 128256 * 4096 // 8 + norms)
    assert split.weight_bytes(config.weights(), "bfloat16", int8=True) == expected
    cache = jax.eval_shape(lambda: config.blocks[0].mixer.layer.empty_cache(8, 2048, jnp.bfloat16))
    assert split.state_bytes(cache) == 2 * 2 * 8 * 2048 * 128 + 4 * 8  # keys, values; the rows' lengths


def test_few_key_value_heads_are_copied():
    """Eight heads over 16 chips: each chip has one, as over 8."""
    config = config_of("Llama-3.1-70B", num_hidden_layers=1)
    cache = jax.eval_shape(lambda: config.blocks[0].mixer.layer.empty_cache(8, 2048, jnp.bfloat16))
    by_degree = [Split.of(config, {"tensor": degree}).state_bytes(cache) for degree in (4, 8, 16)]
    assert by_degree[0] - 32 == 2 * (by_degree[1] - 32) and by_degree[1] == by_degree[2]


def test_the_text_of_a_split_is_a_mesh_for_load():
    config = config_of("Llama-3.1-8B", num_hidden_layers=1)
    assert Split.of(config, {"tensor": 4, "data": 2, "expert": 1}).text == "tensor=4,data=2"
    assert Split.of(config, {}).text == "data=1"
    split = Split.of(config, {"tensor": 4, "data": 2})
    mesh = read_mesh(split.text)
    assert dict(fit_mesh(mesh, config).shape) == dict(split.mesh.shape)


def test_axes_that_do_not_divide_are_named():
    config = config_of("Llama-3.1-8B", num_hidden_layers=1)
    split = Split.of(config, {"tensor": 3})
    with pytest.raises(
        ValueError, match="mixer/query: its axis N of 32 query heads does not divide over the 3 devices"
    ):
        split.weight_bytes(config.weights(), "bfloat16")


@pytest.mark.parametrize("sizes", [{"data": 8}, {"context": 4, "data": 2}], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_bytes_equal_those_of_real_arrays_on_a_device(kind, sizes):
    """A state after prefill, of a batch and a capacity that divide, and the weights, on eight CPU devices."""
    model, batch = model_of(kind), 8
    split = Split.of(model.config, sizes)
    mesh = fit_mesh(read_mesh(split.text), model.config)
    on_mesh = dataclasses.replace(model, execution=Execution("xla", mesh))
    params = jax.tree.map(
        lambda weight, leaf: place(mesh, RULES, leaf, weight, "weight"),
        model.config.weights(),
        params_of(kind),
        is_leaf=lambda leaf: isinstance(leaf, Weight),
    )
    device = jax.devices()[0]

    def held(tree):
        shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
        return sum(shard.data.nbytes for shard in shards if shard.device == device)

    assert split.weight_bytes(model.config.weights(), "float32") == held(params)
    prompt, lengths = np.zeros((batch, 2), np.int32), np.full(batch, 1)
    state = decoding.prefill(on_mesh, params, prompt, lengths, 30, np.zeros(batch, np.uint32))
    assert split.decode_state_bytes(batch, state.tokens.shape[1], jnp.float32) == held(state)
