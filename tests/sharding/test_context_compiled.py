"""Context parallelism compiled for TPUs that are not there: each chip's kernel reads its own slots, and caches stay."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.bench_gpu import SHAPES
from decodax import decoding
from decodax.core.weight import Weight
from decodax.decoding.chunked_prefill import prefill_chunk
from decodax.decoding.sampling import Sampling
from decodax.decoding.state import empty_state
from decodax.layers.execution import Execution
from decodax.models.model import Model
from tests.kernels_pallas.ahead_of_time import count_kernels, tpu_mesh
from tests.sharding.collectives import collectives

NUM_LAYERS, BATCH, CAPACITY, CHIPS = 2, 4, 65536, {"context": 2, "tensor": 2}


def model_on_chips() -> tuple[Model, Any, Any]:
    """Two layers of an 8-billion Llama, its parameters and a state, as shapes on two by two chips of a v5e."""
    mesh = Mesh(np.reshape(tpu_mesh("v5e", 4).devices, tuple(CHIPS.values())), tuple(CHIPS))
    execution = Execution("tpu", mesh)
    model = dataclasses.replace(SHAPES["8b"], num_layers=NUM_LAYERS).model()
    model = dataclasses.replace(model, execution=execution)

    def weight(described: Weight) -> jax.ShapeDtypeStruct:
        sharding = execution.rules.sharding(mesh, described, "weight")
        return jax.ShapeDtypeStruct(described.shape, jnp.bfloat16, sharding=sharding)

    params = jax.tree.map(weight, model.config.weights(), is_leaf=lambda leaf: isinstance(leaf, Weight))

    def start(sampling: Sampling) -> decoding.DecodeState:
        one, stop_ids = jnp.ones(BATCH, jnp.int32), jnp.zeros((BATCH, 0), jnp.int32)
        tokens = jnp.zeros((BATCH, CAPACITY), jnp.int32)
        unplaced = dataclasses.replace(model, execution=Execution("tpu"))
        return empty_state(unplaced, jnp.bfloat16, tokens, one, one, one.astype(jnp.uint32), stop_ids, sampling)

    state = jax.eval_shape(start, Sampling.create(BATCH, model.config.vocab_size))
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return model, params, jax.tree.map(place, state, execution.shardings(state))


def cache_copies(compiled: Any) -> list[str]:
    """Operations that copy an array as large as a chip's part of a cache."""
    heads, slots = 8 // CHIPS["tensor"], CAPACITY // CHIPS["context"]
    part = f"= bf16[{BATCH},{heads},{slots},128]"
    lines = compiled.as_text().splitlines()
    return [line for line in lines if part in line and (" copy(" in line or " transpose(" in line)]


def test_the_decoding_loop():
    model, params, state = model_on_chips()
    assert state.caches[0].key.sharding.spec == PartitionSpec(None, "tensor", "context", None)
    with jax.default_matmul_precision("default"):
        loop = jax.jit(decoding.autoregressive(model), donate_argnums=1)
        compiled = loop.lower(params, state).compile()
    assert count_kernels(compiled, "flash_decode") == NUM_LAYERS
    assert cache_copies(compiled) == []
    over_context = [one for one in collectives(compiled) if "shard_map" in one.operation]
    heads = 32 // CHIPS["tensor"]
    # Of every layer: the largest log-sum-exp, and what chips have read, 128 numbers and a weight for each head.
    assert sorted(one.num_bytes for one in over_context) == sorted(
        [4 * BATCH * heads, 4 * BATCH * heads * 129] * NUM_LAYERS
    )
    assert {one.kind for one in collectives(compiled)} == {"all-reduce"}
    assert compiled.memory_analysis().temp_size_in_bytes < 3e7  # a chip's part of one cache has 134 million bytes


@pytest.mark.slow
def test_a_chunk_of_a_prompt():
    """Kernels of the one layer that is run: three on own tokens, two a step, one on the cache."""
    model, params, state = model_on_chips()
    model = dataclasses.replace(model, execution=dataclasses.replace(model.execution, context="ring"))
    start = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(model.execution.mesh, PartitionSpec()))
    with jax.default_matmul_precision("default"):
        compiled = prefill_chunk.lower(model, None, 1024, params, state, start).compile()
    assert count_kernels(compiled, "flash_prefill") == 3 + 2 + 1
    assert cache_copies(compiled) == []
