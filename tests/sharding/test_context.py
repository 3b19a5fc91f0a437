"""Prompts and caches split over devices: the logits and tokens of one device, and what the compiled loops send."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import decoding
from decodax.decoding.chunked_prefill import prefill_chunk
from decodax.decoding.drafters import DraftModel
from decodax.decoding.sizes import cache_capacity, chunk_tokens
from decodax.decoding.verifiers import ExactMatch
from decodax.layers.execution import Execution
from decodax.sharding.mesh import read_mesh
from tests.sharding import wide
from tests.sharding.collectives import collectives, count

NUM_ROWS, NEW = 4, 9
LENGTHS = np.array([171, 90, 131, 3])  # behind one another, the first chunk is read by all but the last row
PROMPTS = np.random.default_rng(0).integers(0, wide.VOCABULARY, (NUM_ROWS, 171))
CHUNK = 96  # two chunks, the second behind a cache; twelve tokens on each of eight devices
COMBINED = "data=2,context=2,tensor=2"
QUICK = {("dense", "context=8"), ("moe", COMBINED), ("mla", "context=8"), ("linear", "context=8")}
CASES = [
    pytest.param(kind, mesh, marks=() if (kind, mesh) in QUICK else pytest.mark.slow)
    for kind in wide.LAYERS
    for mesh in ("context=8", COMBINED)
]
# Sums are taken in another order than on one device: a few roundings over a few layers, beside the largest logit.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def two_chunks(monkeypatch):
    """On each of eight devices 12 tokens at a time, 48 on each of two, and 96 on a device alone."""
    for_one = lambda num_tokens, most, execution: chunk_tokens(
        num_tokens, CHUNK // execution.num_shards("T"), execution
    )
    monkeypatch.setattr("decodax.decoding.chunked_prefill.chunk_tokens", for_one)


def start(model, params, **options):
    rows = np.arange(NUM_ROWS)
    return decoding.prefill(model, params, PROMPTS, LENGTHS, NEW, rows, stop_token_ids=wide.NO_STOPS, **options)


@cache
def single(kind):
    """Tokens and logprobs of plain decoding on one device."""
    model, params = wide.model_of(kind), wide.params_of(kind)
    out = jax.jit(decoding.autoregressive(model))(params, start(model, params))
    width = LENGTHS.max() + NEW
    return np.asarray(out.tokens)[:, :width], np.asarray(out.logprobs)[:, :width]


def check(out, kind):
    for got, want, tolerance in zip((out.tokens, out.logprobs), single(kind), (0, TOLERANCE), strict=True):
        np.testing.assert_allclose(np.asarray(got)[:, : want.shape[1]], want, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("kind", "mesh"), wide.runnable(CASES))
@pytest.mark.quick_cases(1)
def test_logits(kind, mesh):
    @jax.jit
    def forward(params, tokens):
        position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return model.logits(params, model.apply(params, tokens, position).hidden)

    tokens, logits = np.asarray(PROMPTS[:, :80], np.int32), []
    for over in (None, mesh):
        model, params = wide.model_of(kind, over), wide.params_of(kind, over)
        forward.clear_cache()
        logits.append(np.asarray(forward(params, tokens)))
    np.testing.assert_allclose(logits[1], logits[0], atol=TOLERANCE * np.abs(logits[0]).max(), rtol=0)


@pytest.mark.parametrize(("kind", "mesh"), wide.runnable(CASES))
@pytest.mark.quick_cases(1)
def test_plain_decoding(kind, mesh):
    model, params = wide.model_of(kind, mesh), wide.params_of(kind, mesh)
    check(jax.jit(decoding.autoregressive(model))(params, start(model, params)), kind)


@pytest.mark.parametrize(("kind", "mesh"), wide.runnable(CASES))
@pytest.mark.quick_cases(1)
def test_a_tree_of_drafts(kind, mesh):
    model, params = wide.model_of(kind, mesh), wide.params_of(kind, mesh)
    decode = decoding.speculative(model, DraftModel(wide.draft_model(kind, model), (-1, 0, 0, 1)), ExactMatch())
    draft = model.execution.replicated(wide.draft_of(kind))
    out = jax.jit(decode)(params, draft, decode.start(params, draft, start(model, params)))
    check(out, kind)
    assert out.counts.accepted.sum() > 0


@pytest.mark.slow
def test_a_ring():
    """Where Ulysses would be taken, the ring that was asked for."""
    model, params = wide.model_of("dense", "context=8", context="ring"), wide.params_of("dense", "context=8")
    check(jax.jit(decoding.autoregressive(model))(params, start(model, params)), "dense")


def decoding_loop(kind, *, speculative):
    model, params = wide.model_of(kind, "context=8"), wide.params_of(kind, "context=8")
    state = start(model, params)
    if not speculative:
        return jax.jit(decoding.autoregressive(model), donate_argnums=1).lower(params, state).compile(), state
    decode = decoding.speculative(model, DraftModel(model, (-1, 0, 0, 1)), ExactMatch())
    started = decode.start(params, params, state)
    return jax.jit(decode, donate_argnums=2).lower(params, params, started).compile(), started


@pytest.mark.parametrize(("kind", "heads_x_size"), [("dense", 8 * 6), ("mla", 8 * (11 + 4))])
@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.quick_cases(1)
def test_decoding_sends_heads_and_no_slots(kind, heads_x_size, speculative):
    """Two sums a layer, of H + 1 numbers for each query and head, and of one; nothing else, and no cache moves."""
    compiled, state = decoding_loop(kind, speculative=speculative)
    num_forwards, num_nodes = (2, 4) if speculative else (1, 1)  # the draft's and the target's
    assert count(compiled) == {"all-reduce": 2 * len(wide.LAYERS[kind]) * num_forwards}
    assert max(one.num_bytes for one in collectives(compiled)) <= 4 * NUM_ROWS * num_nodes * (heads_x_size + 8)
    buffers = [leaf for leaf in jax.tree.leaves(state.caches) if leaf.ndim > 2]
    assert all(leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in buffers)
    parts = {leaf.sharding.shard_shape(leaf.shape) for leaf in buffers}
    for shape in (*parts, *(leaf.shape for leaf in buffers)):
        written = f"= f32[{','.join(map(str, shape))}]"
        assert not [line for line in compiled.as_text().splitlines() if written in line and " copy(" in line]
    written_in_place = sum(leaf.nbytes for leaf in buffers) // 8
    assert compiled.memory_analysis().alias_size_in_bytes >= written_in_place


def test_a_chunk_gathers_rows_and_queries_and_no_slots():
    """Only attention and what is written to caches moves: neither hidden states nor a cache are gathered."""
    model, params = wide.model_of("dense", "context=8"), wide.params_of("dense", "context=8")
    state = start(model, params)
    first = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = prefill_chunk.lower(model, None, CHUNK, params, state, first).compile()
    gathered = sorted(one.num_bytes for one in collectives(compiled) if one.kind == "all-gather")
    queries, keys = 4 * NUM_ROWS * CHUNK * 8 * 6, [4 * NUM_ROWS * CHUNK * heads * 6 for heads in (2, 8)]
    hidden = 4 * NUM_ROWS * CHUNK * wide.WIDTH
    assert hidden not in gathered
    assert set(gathered) - {queries, *keys} <= {4 * NUM_ROWS * CHUNK * heads for heads in (1, 2, 8)} | {4 * CHUNK}


def test_sizes_divide_over_the_devices():
    execution = Execution(mesh=read_mesh("context=8"))
    assert cache_capacity(180, execution) == 192  # a bucket that divides by 8
    assert cache_capacity(17, execution) == 24
    assert cache_capacity(17, dataclasses.replace(execution, implementation="tpu_interpreted")) == 8 * 128
    assert chunk_tokens(10_000, 512, execution) == 8 * 512
    assert chunk_tokens(70, 512, execution) == 80
    assert chunk_tokens(17, 512, execution) == 32  # two blocks for each device
    assert chunk_tokens(17, 512, Execution()) == 20
