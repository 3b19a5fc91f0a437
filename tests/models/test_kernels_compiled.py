"""A Llama of 8 billion parameters compiled for TPUs that are not there: kernels in every layer, and no copy of a cache.

Four chips of a v5e hold it in bfloat16; weights and heads are split over them.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from decodax import decoding
from decodax.decoding.sampling import Sampling
from decodax.decoding.state import _empty_state
from decodax.layers.execution import Execution
from decodax.layers.weight import Weight
from decodax.models.model import Model, commit
from decodax.scripts.bench_gpu import SHAPES
from decodax.sharding.rules import TENSOR
from tests.kernels_pallas.ahead_of_time import count_kernels, tpu_mesh

BATCH, CAPACITY = 8, 16384  # a part of one cache is 64 MiB: too large for XLA to move it into VMEM


def on_mesh(mesh: Mesh, leaf: Any) -> jax.ShapeDtypeStruct:
    """Caches are split by heads, [B, K, S, H]; the rest of the state lies on every chip."""
    spec = PartitionSpec(None, "tensor") if len(leaf.shape) == 4 else PartitionSpec()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))


def model_on(mesh: Mesh, num_layers: int) -> tuple[Model, Any, Any]:
    """The model, its parameters and a state of decoding, as shapes on the mesh."""
    model = dataclasses.replace(SHAPES["8b"], num_layers=num_layers).model()
    model = dataclasses.replace(model, execution=Execution("tpu", mesh))

    def weight(described: Weight) -> jax.ShapeDtypeStruct:
        sharding = TENSOR.sharding(mesh, described, "weight")
        return jax.ShapeDtypeStruct(described.shape, jnp.bfloat16, sharding=sharding)

    params = jax.tree.map(weight, model.config.weights(), is_leaf=lambda leaf: isinstance(leaf, Weight))

    def start(sampling: Sampling) -> decoding.DecodeState:
        tokens, one = jnp.zeros((BATCH, CAPACITY), jnp.int32), jnp.ones(BATCH, jnp.int32)
        stop_ids = jnp.zeros((BATCH, 0), jnp.int32)
        return _empty_state(model, jnp.bfloat16, tokens, one, one, one.astype(jnp.uint32), stop_ids, sampling)

    state = jax.eval_shape(start, Sampling.create(BATCH, model.config.vocab_size))
    return model, params, jax.tree.map(lambda leaf: on_mesh(mesh, leaf), state)


def cache_copies(compiled: Any) -> list[str]:
    """Operations of the program that copy a cache as large as a chip's part of one."""
    shape = rf"bf16\[{BATCH},\d+,{CAPACITY},128\]"
    return re.findall(rf"{shape}\S* (?:copy|transpose)\(.*", compiled.as_text())


def test_the_decoding_loop():
    num_layers = SHAPES["8b"].num_layers
    model, params, state = model_on(tpu_mesh("v5e", 4), num_layers)
    loop = jax.jit(decoding.autoregressive(model), donate_argnums=1)
    with jax.default_matmul_precision("default"):
        compiled = loop.lower(params, state).compile()
    assert count_kernels(compiled, "flash_decode") == num_layers
    assert cache_copies(compiled) == []
    cache_bytes = (
        sum(leaf.size * leaf.dtype.itemsize for cache in state.caches for leaf in (cache.key, cache.value)) // 4
    )
    assert compiled.memory_analysis().temp_size_in_bytes < cache_bytes / num_layers


@pytest.mark.parametrize(("num_layers", "chunk"), [(1, 128), pytest.param(4, 512, marks=pytest.mark.slow)])
def test_the_prompt(num_layers, chunk):
    """Compiling takes XLA seconds per layer here, so not all of them."""
    mesh = tpu_mesh("v5e", 4)
    model, params, state = model_on(mesh, num_layers)

    def read(params, tokens, position, caches):
        out = model.apply(params, tokens, position, caches)
        return out.hidden, commit(caches, out.rows, jnp.sum(jnp.isfinite(out.hidden[:, :, 0]), axis=1, dtype=jnp.int32))

    tokens = on_mesh(mesh, jax.ShapeDtypeStruct((BATCH, chunk), jnp.int32))
    with jax.default_matmul_precision("default"):
        compiled = jax.jit(read, donate_argnums=3).lower(params, tokens, tokens, state.caches).compile()
    assert count_kernels(compiled, "flash_prefill") == 2 * num_layers  # over the chunk itself, and over the cache
    assert cache_copies(compiled) == []
