"""Rows are put into states over devices as on one device, and no device gathers a cache for it."""

import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import decodax
from decodax import decoding
from decodax.models.load import LanguageModel
from tests.models.test_pipelined import TWO, in_stages, model_of, params_of
from tests.sharding import wide

PROMPTS = [np.random.default_rng(index).integers(0, wide.VOCABULARY, 3 + index % 9).tolist() for index in range(11)]
OPTIONS = {"max_new_tokens": 9, "temperature": [0.0, 0.8] * 5 + [0.0], "seed": 3}


def generated(model, params, **options):
    lm = LanguageModel(model, model.config, params, None, Path("wide"), ())
    return decodax.generate(lm, PROMPTS, **OPTIONS, **options).tokens


def assert_same(mine, theirs):
    for row, wanted in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(row, wanted)


@pytest.mark.parametrize(
    ("kind", "mesh"),
    wide.runnable(
        [pytest.param(kind, mesh) for kind in wide.LAYERS for mesh in ("data=4,tensor=2", "data=2,context=2,tensor=2")]
    ),
)
@pytest.mark.quick_cases(1)
def test_refilled_rows_have_the_tokens_of_one_device(kind, mesh):
    wanted = generated(wide.model_of(kind), wide.params_of(kind), batch_size=4)
    over_mesh = wide.model_of(kind, mesh), wide.params_of(kind, mesh)
    assert_same(generated(*over_mesh, batch_size=4, block_tokens=3), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moe", "blocks"])
def test_refilled_rows_of_pipeline_stages(kind):
    wanted = generated(model_of(kind, 2), params_of(kind, 2), batch_size=4)
    assert_same(generated(*in_stages(kind, TWO, 1, micro_batches=2), batch_size=4, block_tokens=3), wanted)


@pytest.mark.parametrize("kind", ["moe", "mla", "blocks"])
@pytest.mark.quick_cases(1)
def test_no_device_gathers_a_cache(kind):
    model, params = wide.model_of(kind, "data=4,tensor=2"), wide.params_of(kind, "data=4,tensor=2")
    state = wide.start(model, params)
    room = state.tokens.shape[1]
    fresh = decoding.prefill(
        model, params, wide.PROMPTS[:2], wide.LENGTHS[:2], wide.NEW, np.arange(2), capacity=room,
        sampling=decoding.take_rows(state.sampling, np.arange(2)), stop_token_ids=wide.NO_STOPS,
    )  # fmt: skip
    put = jax.jit(lambda state, fresh: model.execution.constrained(decoding.put_rows(state, np.array([5, 0]), fresh)))
    text = put.lower(state, fresh).compile().as_text()
    largest = max(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state.caches))
    found = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", text)
    assert all(math.prod(map(int, filter(None, sizes.split(",")))) <= largest for sizes in found)
