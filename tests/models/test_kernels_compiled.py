"""A Llama of 8 billion parameters, compiled for absent TPUs, has kernels in every layer and no copy of a cache.

Weights and heads are split over the chips of a v5e slice.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.bench_gpu import SHAPES
from decodax import decoding
from decodax.core.weight import Weight
from decodax.decoding.sampling import Sampling
from decodax.decoding.state import empty_state
from decodax.layers.execution import Execution
from decodax.models.key_value_copies import fit_mesh
from decodax.models.model import Model, commit
from decodax.sharding.mesh import read_mesh
from decodax.sharding.rules import RULES
from decodax.sharding.topologies import tpu_devices
from tests.kernels_pallas.ahead_of_time import count_kernels, tpu_mesh
from tests.sharding.collectives import collectives

BATCH, CAPACITY = 8, 16384  # a shard of one cache is 64 MiB: too large for XLA to move it into VMEM


def model_on(mesh: Mesh, num_layers: int) -> tuple[Model, Any, Any]:
    """The model, its parameters and a state of decoding, as shapes on the mesh."""
    model = dataclasses.replace(SHAPES["8b"], num_layers=num_layers).model()
    mesh = fit_mesh(mesh, model.config)
    model = dataclasses.replace(model, execution=Execution("tpu", mesh))

    def weight(described: Weight) -> jax.ShapeDtypeStruct:
        sharding = RULES.sharding(mesh, described, "weight")
        return jax.ShapeDtypeStruct(described.shape, jnp.bfloat16, sharding=sharding)

    params = jax.tree.map(weight, model.config.weights(), is_leaf=lambda leaf: isinstance(leaf, Weight))

    def start(sampling: Sampling) -> decoding.DecodeState:
        tokens, one = jnp.zeros((BATCH, CAPACITY), jnp.int32), jnp.ones(BATCH, jnp.int32)
        stop_ids = jnp.zeros((BATCH, 0), jnp.int32)
        return empty_state(model, jnp.bfloat16, tokens, one, one, one.astype(jnp.uint32), stop_ids, sampling)

    state = jax.eval_shape(start, Sampling.create(BATCH, model.config.vocab_size))
    places = model.execution.shardings(state)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return model, params, jax.tree.map(place, state, places)


def slice_of(num_chips: int) -> Mesh:
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu (Linux on x86-64)")
    return read_mesh(f"tensor={num_chips}", tpu_devices({8: "v5e:2x4", 16: "v5e:4x4"}[num_chips]))


def cache_copies(compiled: Any) -> list[str]:
    """Operations of the program that copy a cache as large as a chip's shard of one."""
    shape = rf"bf16\[{BATCH},\d+,{CAPACITY},128\]"
    return re.findall(rf"{shape}\S* (?:copy|transpose)\(.*", compiled.as_text())


@pytest.mark.parametrize(
    ("chips", "kv_shards", "num_layers"),
    [(8, 8, 3), pytest.param(8, 8, SHAPES["8b"].num_layers, marks=pytest.mark.slow), (16, 8, 2)],
    ids=["8 chips", "8 chips, all layers", "16 chips"],
)
def test_the_decoding_loop(chips, kv_shards, num_layers):
    """Eight key-value heads on sixteen chips are held twice, and the kernel runs on each chip as on eight."""
    model, params, state = model_on(slice_of(chips), num_layers)
    loop = jax.jit(decoding.autoregressive(model), donate_argnums=1)
    with jax.default_matmul_precision("default"):
        compiled = loop.lower(params, state).compile()
    assert count_kernels(compiled, "flash_decode") == num_layers
    assert cache_copies(compiled) == []
    buffers = [leaf for cache in state.caches for leaf in (cache.key, cache.value)]
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in buffers) // kv_shards
    assert {one.kind for one in collectives(compiled)} == {"all-reduce"}  # neither weights nor caches are gathered
    assert compiled.memory_analysis().temp_size_in_bytes < cache_bytes / num_layers


@pytest.mark.parametrize(("num_layers", "chunk"), [(1, 128), pytest.param(4, 512, marks=pytest.mark.slow)])
def test_the_prompt(num_layers, chunk):
    """Compiling takes XLA seconds per layer here, so not all of them."""
    mesh = tpu_mesh("v5e", 4)
    model, params, state = model_on(mesh, num_layers)

    def read(params, tokens, position, caches):
        out = model.apply(params, tokens, position, caches)
        return out.hidden, commit(
            caches, out.cache_updates, jnp.sum(jnp.isfinite(out.hidden[:, :, 0]), axis=1, dtype=jnp.int32)
        )

    everywhere = NamedSharding(mesh, PartitionSpec())
    tokens = jax.ShapeDtypeStruct((BATCH, chunk), jnp.int32, sharding=everywhere)
    with jax.default_matmul_precision("default"):
        compiled = jax.jit(read, donate_argnums=3).lower(params, tokens, tokens, state.caches).compile()
    assert count_kernels(compiled, "flash_prefill") == 2 * num_layers  # over the chunk itself, and over the cache
    assert cache_copies(compiled) == []
