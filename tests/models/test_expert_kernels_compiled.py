"""The decoding step of large models with experts, compiled for absent TPUs, contains the right kernels.

Heads, experts and the vocabulary are split over four chips of a v5e.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from decodax import decoding
from decodax.core.weight import Weight
from decodax.decoding.sampling import Sampling
from decodax.decoding.state import empty_state
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.full import KVCache
from decodax.layers.kv_cache.latent import LatentCache
from decodax.models.configs.hf_config import read_config
from decodax.models.model import Model
from decodax.sharding.rules import Rules
from tests.kernels_pallas.ahead_of_time import count_kernels, tpu_mesh
from tests.models.test_published_sizes import PUBLISHED

BATCH, CAPACITY = 8, 4096
RULES = Rules(tuple((axis_name, "tensor") for axis_name in "NKVE"))
# (layers compiled in a quick run, layers with experts among them, all layers)
LAYERS = {"DeepSeek-V2-Lite, arXiv 2405.04434": (2, 1, 27), "Qwen3-30B-A3B, arXiv 2505.09388": (1, 1, 48)}


def model_on(mesh: Mesh, name: str, num_layers: int) -> tuple[Model, Any, Any]:
    """The model, its parameters and a state of decoding, as shapes on the mesh."""
    config = read_config(PUBLISHED[name][0] | {"num_hidden_layers": num_layers})[1]
    model = Model(config, execution=Execution("tpu", mesh, RULES))

    def weight(described: Weight) -> jax.ShapeDtypeStruct:
        sharding = RULES.sharding(mesh, described, "weight")
        return jax.ShapeDtypeStruct(described.shape, jnp.bfloat16, sharding=sharding)

    params = jax.tree.map(weight, config.weights(), is_leaf=lambda leaf: isinstance(leaf, Weight))

    def start(sampling: Sampling) -> decoding.DecodeState:
        tokens, one = jnp.zeros((BATCH, CAPACITY), jnp.int32), jnp.ones(BATCH, jnp.int32)
        stop_ids = jnp.zeros((BATCH, 0), jnp.int32)
        return empty_state(model, jnp.bfloat16, tokens, one, one, one.astype(jnp.uint32), stop_ids, sampling)

    def on_mesh(leaf: Any) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(None, "tensor") if leaf.ndim == 4 else PartitionSpec()  # heads of keys and values
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    state = jax.eval_shape(start, Sampling.create(BATCH, config.vocab_size))
    return model, params, jax.tree.map(on_mesh, state)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LAYERS)
def test_kernels_of_the_decoding_loop(name, whole):
    few, sparse, every = LAYERS[name]
    num_layers = every if whole else few
    num_sparse = every - (few - sparse) if whole else sparse
    model, params, state = model_on(tpu_mesh("v5e", 4), name, num_layers)
    loop = jax.jit(decoding.autoregressive(model), donate_argnums=1)
    with jax.default_matmul_precision("default"):
        compiled = loop.lower(params, state).compile()
    attention = "flash_decode" if isinstance(state.caches[0], KVCache) else "mla_decode"
    assert count_kernels(compiled, attention) == num_layers
    assert count_kernels(compiled, "grouped_gate_up") == count_kernels(compiled, "grouped_matmul") == num_sparse
    expert_bytes = sum(leaf.size * 2 for leaf in jax.tree.leaves(params["blocks_1" if few > 1 else "blocks_0"])) // 4
    # Rope keys, narrower than 128 lanes, are copied once, before the loop, into the layout that the kernel reads.
    latents = [cache for cache in state.caches if isinstance(cache, LatentCache)]
    rope_bytes = 2 * BATCH * CAPACITY * 128 * len(latents)
    assert compiled.memory_analysis().temp_size_in_bytes < expert_bytes + rope_bytes  # no copy of the experts


def test_config_sizes_are_the_published_ones():
    """Compiled configs differ from published ones in the number of layers only."""
    for name, (few, _, every) in LAYERS.items():
        raw = PUBLISHED[name][0]
        whole, cut = read_config(raw)[1], read_config(raw | {"num_hidden_layers": few})[1]
        assert whole.num_layers == every and whole.blocks[:few] == cut.blocks
        assert dataclasses.replace(whole, blocks=()) == dataclasses.replace(cut, blocks=())
