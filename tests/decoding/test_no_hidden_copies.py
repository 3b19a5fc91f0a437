"""What XLA makes of the loops: caches are written in place, and nothing as large as a cache is made besides.

Read from the compiled HLO: an instruction that copies or transposes an array as large as a cache, or that needs
temporary memory like one, would cost a pass over the whole cache at every token.
"""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import decoding
from decodax.decoding import state as decode_state
from decodax.decoding.depth import SkipDecode
from decodax.decoding.drafters import DraftModel, NoDraft
from decodax.decoding.sampling import Sampling
from decodax.decoding.verifiers import ExactMatch
from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.kv_cache.full import KVCache, KVRows
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.norm import RMSNormConfig
from decodax.layers.rope import Rope
from decodax.models.config import BlockConfig, ModelConfig
from decodax.models.model import Model, commit

NORM = RMSNormConfig(1e-5)
LAYERS, KV_HEADS, HEAD_SIZE, BATCH, VOCABULARY, WIDTH = 3, 3, 16, 5, 97, 24
# Below one attention block, and above it: with several blocks a step, and a last one that does not fit.
CAPACITIES = (224, 896)


def model_with(capacity):
    mixer = GQAConfig(2 * KV_HEADS, KV_HEADS, HEAD_SIZE, Rope(HEAD_SIZE, 1e4), scale=0.25)
    block = BlockConfig(mixer, GatedMLPConfig(29), NORM)
    return Model(ModelConfig(VOCABULARY, WIDTH, 1024, (block,) * LAYERS, NORM, False))


def abstract(capacity, track_kept=False, temperature=0.0):
    """The model, and shapes of its parameters and of a state with this capacity: nothing is computed."""
    model = model_with(capacity)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    sampling = Sampling.create(BATCH, VOCABULARY, temperature=temperature)
    rows = np.zeros(BATCH, np.int32)
    no_stops = np.zeros((BATCH, 0), np.int32)

    def empty():
        state = decode_state._empty_state(
            model, jnp.dtype("float32"), jnp.zeros((BATCH, capacity), jnp.int32), jnp.asarray(rows),
            jnp.asarray(rows), jnp.asarray(rows, jnp.uint32), jnp.asarray(no_stops), sampling,
        )  # fmt: skip
        if track_kept:
            cache = KVCache.empty(BATCH, KV_HEADS, capacity, HEAD_SIZE, jnp.float32, track_kept=True)
            state = dataclasses.replace(state, caches=(cache,) * LAYERS)
        return state

    return model, params, jax.eval_shape(empty)


def cache_sized_copies(compiled, capacity):
    """Copies and transposes of arrays with as many elements as one cache's keys, anywhere in it."""
    elements = BATCH * KV_HEADS * capacity * HEAD_SIZE
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(r"= \(?\w+\[([\d,]+)\]\S* (copy|copy-start|transpose)\(", line)
        if match and np.prod([int(size) for size in match[1].split(",")]) >= elements:
            found.append(line.strip()[:200])
    return found


def check_in_place(compiled, capacity, num_caches=LAYERS):
    assert not cache_sized_copies(compiled, capacity)
    layer_bytes = 2 * BATCH * KV_HEADS * capacity * HEAD_SIZE * 4
    assert compiled.memory_analysis().temp_size_in_bytes < layer_bytes
    # The caches that come out are those that went in.
    assert compiled.memory_analysis().alias_size_in_bytes >= num_caches * layer_bytes


def compile_loop(loop, params, state):
    return jax.jit(loop, donate_argnums=1).lower(params, state).compile()


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_decode_loop(capacity):
    model, params, state = abstract(capacity)
    check_in_place(compile_loop(decoding.autoregressive(model), params, state), capacity)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_prefill_chunk(capacity):
    model, params, state = abstract(capacity)
    chunk = 3  # with more queries than a head has coordinates, the scores alone are as large as the cache
    start = jax.ShapeDtypeStruct((), jnp.int32)
    check_in_place(decode_state._prefill_chunk.lower(model, None, chunk, params, state, start).compile(), capacity)


CHAIN, TREE = (-1, 0, 1, 2), (-1, 0, 0, 1)


@pytest.mark.parametrize(("tree", "capacity"), [(CHAIN, CAPACITIES[0]), (CHAIN, CAPACITIES[1]), (TREE, CAPACITIES[1])])
def test_speculative_loop(tree, capacity):
    """The target's caches and those of a draft model of the same size, whose tokens are drawn."""
    model, params, state = abstract(capacity, temperature=0.7)
    decode = decoding.speculative(model, DraftModel(model, tree), ExactMatch())
    started = jax.eval_shape(decode.start, params, params, state)
    compiled = jax.jit(decode, donate_argnums=2).lower(params, params, started).compile()
    check_in_place(compiled, capacity, num_caches=2 * LAYERS)


def skipping_loop(model, *, count_depends_on_reads=True):
    """A loop that runs each layer after the first only for every other token, as early-exit methods are written.

    A layer runs inside `lax.cond`, which gives hidden states and rows; a skipped one gives rows that are marked as not
    kept, and all rows are committed outside.
    """

    def step(params, state):
        position = state.length[:, None] - 1
        hidden = model.embed(params, state.pending()[:, None])
        rows = []

        def run(index, hidden):
            out = model.apply(params, hidden, position, state.caches, layers=(index, index + 1))
            return out.hidden, dataclasses.replace(out.rows[0], kept=jnp.ones((BATCH, 1), bool))

        def skip(index, hidden):
            nothing = jnp.zeros((BATCH, KV_HEADS, 1, HEAD_SIZE))
            return hidden, KVRows(nothing, nothing, jnp.zeros((BATCH, 1), bool))

        for index in range(LAYERS):
            if index == 0:
                hidden, new = run(index, hidden)
            else:
                is_full_step = state.num_target_forwards % 2 == 0
                hidden, new = jax.lax.cond(is_full_step, partial(run, index), partial(skip, index), hidden)
            rows.append(new)
        logits = model.logits(params, hidden)[:, 0]
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        sound = jnp.isfinite(jnp.max(logits, axis=-1))
        emit = ~state.done & sound if count_depends_on_reads else ~state.done
        written = commit(state.caches, tuple(rows), emit.astype(jnp.int32))
        state = dataclasses.replace(state, caches=written, num_target_forwards=state.num_target_forwards + 1)
        return state.append(token[:, None], jnp.zeros((BATCH, 1)), emit.astype(jnp.int32))[0]

    def loop(params, state):
        return jax.lax.while_loop(lambda state: ~jnp.all(state.done), lambda state: step(params, state), state)

    return loop


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_loop_that_skips_layers(capacity):
    model, params, state = abstract(capacity, track_kept=True)
    check_in_place(compile_loop(skipping_loop(model), params, state), capacity)


def test_loop_of_a_depth():
    """A layer runs or does not by the state alone, as SkipDecode's do, and the prompt through some layers only."""
    capacity, depth = CAPACITIES[1], SkipDecode(max_layers=3, min_layers=2, decay_tokens=7)
    model, params, state = abstract(capacity)
    decode = decoding.speculative(model, NoDraft(), ExactMatch(), depth)
    started = jax.eval_shape(decode.start, params, None, state)
    check_in_place(jax.jit(decode, donate_argnums=2).lower(params, None, started).compile(), capacity)
    start, fewer = jax.ShapeDtypeStruct((), jnp.int32), SkipDecode(max_layers=2, min_layers=2, decay_tokens=7)
    prefill = decode_state._prefill_chunk.lower(model, fewer, 3, params, state, start).compile()
    check_in_place(prefill, capacity)


def test_the_check_sees_copies():
    """Copies are found where they are known to be made: in a commit that does not wait for what it read."""
    capacity = CAPACITIES[1]
    model, params, state = abstract(capacity, track_kept=True)
    careless = compile_loop(skipping_loop(model, count_depends_on_reads=False), params, state)
    assert cache_sized_copies(careless, capacity)
    assert careless.memory_analysis().temp_size_in_bytes > 2 * BATCH * KV_HEADS * capacity * HEAD_SIZE * 4
