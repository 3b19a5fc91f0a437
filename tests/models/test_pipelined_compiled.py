"""Decoding in pipeline stages, compiled for TPU, runs kernels and copies no slice that a stage selects."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from decodax import decoding
from decodax.core.weight import Weight
from decodax.decoding.sampling import Sampling
from decodax.decoding.state import empty_state
from decodax.layers.execution import Execution
from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.rope import Rope
from decodax.models.config import ModelConfig, pre_norm_block
from decodax.models.model import Model
from decodax.sharding.pipeline import Pipeline
from tests.kernels_pallas.ahead_of_time import count_kernels, tpu_mesh
from tests.tiny import NORM

BATCH, HEADS, HEAD_SIZE, WIDTH, CAPACITY, VOCABULARY = 8, 4, 128, 512, 2048, 256
BLOCK = pre_norm_block(GQAConfig(HEADS, HEADS, HEAD_SIZE, Rope(HEAD_SIZE, 1e4), 0.1), GatedMLPConfig(2048), NORM)


def compiled_loop(pipeline, implementation):
    """Plain decoding over 2 stages of 2 chips, each stage with two layers: its program, and its caches."""
    chips = np.asarray(tpu_mesh("v5e", 4).devices).reshape(2, 2)
    mesh = Mesh(chips, ("pipeline", "tensor"), axis_types=(AxisType.Auto,) * 2)
    config = ModelConfig(VOCABULARY, WIDTH, CAPACITY, (BLOCK,) * 4, NORM, tie_embeddings=False)
    model = Model(config, execution=Execution(implementation, mesh, pipeline=pipeline))
    sampling = Sampling.create(BATCH, VOCABULARY)
    rows, no_stops = np.zeros(BATCH, np.int32), np.zeros((BATCH, 0), np.int32)

    def empty():
        tokens = jnp.zeros((BATCH, CAPACITY), jnp.int32)
        operands = (jnp.asarray(rows), jnp.asarray(rows), jnp.asarray(rows, jnp.uint32), jnp.asarray(no_stops))
        state = empty_state(Model(config), jnp.dtype("bfloat16"), tokens, *operands, sampling)
        return dataclasses.replace(state, caches=model.empty_cache(BATCH, CAPACITY, jnp.bfloat16))

    def weight_shape(path, weight):
        sharding = model.execution.rules.sharding(mesh, weight, str(path))
        return jax.ShapeDtypeStruct(weight.shape, jnp.bfloat16, sharding=sharding)

    is_weight = lambda leaf: isinstance(leaf, Weight)
    params = jax.tree_util.tree_map_with_path(weight_shape, model.weights(), is_leaf=is_weight)
    state = jax.eval_shape(empty)
    described = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    state = jax.tree.map(described, state, model.execution.shardings(state))
    return jax.jit(decoding.autoregressive(model), donate_argnums=1).lower(params, state).compile()


def largest_temporary(program):
    return program.memory_analysis().temp_size_in_bytes


PART_BYTES = BATCH // 2 * HEADS // 2 * CAPACITY * HEAD_SIZE * 2  # keys of one layer and micro-batch on one chip


def test_the_kernel_reads_all_rows_at_once_in_place():
    program = compiled_loop(Pipeline(micro_batches=1), "tpu")
    assert count_kernels(program, "flash_decode") == 2
    assert largest_temporary(program) < PART_BYTES


@pytest.mark.parametrize("chunks", [1, 2])
def test_micro_batches_and_chunks_are_read_in_place(chunks):
    """Neither keys nor weights are copied: a product reads its slice, and no more."""
    program = compiled_loop(Pipeline(chunks, micro_batches=2), None)
    assert largest_temporary(program) < PART_BYTES
    whole_layer = rf"= bf16\[1,{BATCH},{HEADS // 2},{CAPACITY},{HEAD_SIZE}\]\S* dynamic-slice\("
    assert not re.search(whole_layer, program.as_text())
