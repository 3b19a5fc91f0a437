"""Compiles the decoding loops and finds copies, transposes and buffers as large as a cache in the programs.

`python -m tests.decoding.hidden_copies` prints what it finds in each of CASES, as JSON. test_no_hidden_copies.py runs
that in a process of its own, as the test session's flags for XLA would give other programs than users have.
"""

import dataclasses
import json
import os
import re
import traceback
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from decodax import decoding
from decodax.decoding.chunked_prefill import prefill_chunk
from decodax.decoding.drafters import DraftModel, NoDraft
from decodax.decoding.early_exit import SkipDecode
from decodax.decoding.sampling import Sampling
from decodax.decoding.state import empty_state
from decodax.decoding.token_scores import ScoringState, score_chunk
from decodax.decoding.verifiers import ExactMatch
from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.kv_cache.full import KVCache, KVUpdate
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.norm import RMSNormConfig
from decodax.layers.rope import Rope
from decodax.models.config import ModelConfig, pre_norm_block
from decodax.models.model import Model, commit

NORM = RMSNormConfig(1e-5)
LAYERS, KV_HEADS, HEAD_SIZE, BATCH, VOCABULARY, WIDTH = 3, 3, 16, 5, 97, 24
# Below one attention block, and above it: with several blocks a step, and a last one that does not fit.
CAPACITIES = (224, 896)


def model_with(capacity):
    mixer = GQAConfig(2 * KV_HEADS, KV_HEADS, HEAD_SIZE, Rope(HEAD_SIZE, 1e4), scale=0.25)
    block = pre_norm_block(mixer, GatedMLPConfig(29), NORM)
    return Model(ModelConfig(VOCABULARY, WIDTH, 1024, (block,) * LAYERS, NORM, False))


def abstract(capacity, track_kept=False, temperature=0.0):
    """The model, and shapes of its parameters and of a state with this capacity: nothing is computed."""
    model = model_with(capacity)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    sampling = Sampling.create(BATCH, VOCABULARY, temperature=temperature)
    rows = np.zeros(BATCH, np.int32)
    no_stops = np.zeros((BATCH, 0), np.int32)

    def empty():
        state = empty_state(
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


def problems(compiled, capacity, num_caches=LAYERS):
    """What is wrong with a program that should write caches in place; [] for nothing."""
    found = cache_sized_copies(compiled, capacity)
    layer_bytes = 2 * BATCH * KV_HEADS * capacity * HEAD_SIZE * 4
    memory = compiled.memory_analysis()
    if memory.temp_size_in_bytes >= layer_bytes:
        found.append(f"{memory.temp_size_in_bytes} bytes of temporaries, as large as a layer's cache ({layer_bytes})")
    if memory.alias_size_in_bytes < num_caches * layer_bytes:
        found.append(f"{memory.alias_size_in_bytes} bytes of outputs alias inputs, not all {num_caches} caches")
    return found


def compile_loop(loop, params, state):
    return jax.jit(loop, donate_argnums=1).lower(params, state).compile()


def decode_loop(capacity):
    model, params, state = abstract(capacity)
    return problems(compile_loop(decoding.autoregressive(model), params, state), capacity)


def prefill(capacity):
    model, params, state = abstract(capacity)
    chunk = 3  # with more queries than a head has coordinates, the scores alone are as large as the cache
    start = jax.ShapeDtypeStruct((), jnp.int32)
    return problems(prefill_chunk.lower(model, None, chunk, params, state, start).compile(), capacity)


def score(capacity):
    model, params, state = abstract(capacity)
    integers = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    rows = integers((BATCH, capacity)), integers((BATCH,)), integers((BATCH,)), integers(())
    begun = ScoringState(state.caches, state.failed)
    return problems(score_chunk.lower(model, 3, 1, params, begun, *rows).compile(), capacity)


CHAIN, TREE = (-1, 0, 1, 2), (-1, 0, 0, 1)


def speculative_loop(tree, capacity):
    """The target's caches and those of a draft model of the same size, whose tokens are drawn."""
    model, params, state = abstract(capacity, temperature=0.7)
    decode = decoding.speculative(model, DraftModel(model, tree), ExactMatch())
    started = jax.eval_shape(decode.start, params, params, state)
    compiled = jax.jit(decode, donate_argnums=2).lower(params, params, started).compile()
    return problems(compiled, capacity, num_caches=2 * LAYERS)


def skipping_loop(model, *, count_depends_on_reads=True):
    """A loop that runs each layer after the first only for every other token, as early-exit methods do.

    A layer runs inside `lax.cond`, which gives hidden states and a cache update; a skipped one's update is marked as
    not kept, and all updates are committed outside.
    """

    def step(params, state):
        position = state.length[:, None] - 1
        hidden = model.embed(params, state.last_token()[:, None], state.length[:, None] - 1)
        updates = []

        def run(index, hidden):
            out = model.apply(params, hidden, position, state.caches, layers=(index, index + 1))
            return out.hidden, dataclasses.replace(out.cache_updates[0], kept=jnp.ones((BATCH, 1), bool))

        def skip(index, hidden):
            nothing = jnp.zeros((BATCH, KV_HEADS, 1, HEAD_SIZE))
            return hidden, KVUpdate(nothing, nothing, jnp.zeros((BATCH, 1), bool))

        for index in range(LAYERS):
            if index == 0:
                hidden, new = run(index, hidden)
            else:
                is_full_step = state.num_target_forwards % 2 == 0
                hidden, new = jax.lax.cond(is_full_step, partial(run, index), partial(skip, index), hidden)
            updates.append(new)
        logits = model.logits(params, hidden)[:, 0]
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        is_finite = jnp.isfinite(jnp.max(logits, axis=-1))
        emit = ~state.done & is_finite if count_depends_on_reads else ~state.done
        written = commit(state.caches, tuple(updates), emit.astype(jnp.int32))
        state = dataclasses.replace(state, caches=written, num_target_forwards=state.num_target_forwards + 1)
        return state.append(token[:, None], jnp.zeros((BATCH, 1)), emit.astype(jnp.int32))[0]

    def loop(params, state):
        return jax.lax.while_loop(lambda state: ~jnp.all(state.done), lambda state: step(params, state), state)

    return loop


def loop_that_skips_layers(capacity):
    model, params, state = abstract(capacity, track_kept=True)
    return problems(compile_loop(skipping_loop(model), params, state), capacity)


def loop_of_a_layer_policy():
    """The state alone decides which layers run, as in SkipDecode, and the prompt runs some layers only."""
    capacity, layer_policy = CAPACITIES[1], SkipDecode(max_layers=3, min_layers=2, decay_tokens=7)
    model, params, state = abstract(capacity)
    decode = decoding.speculative(model, NoDraft(), ExactMatch(), layer_policy)
    started = jax.eval_shape(decode.start, params, None, state)
    of_loop = problems(jax.jit(decode, donate_argnums=2).lower(params, None, started).compile(), capacity)
    start, fewer = jax.ShapeDtypeStruct((), jnp.int32), SkipDecode(max_layers=2, min_layers=2, decay_tokens=7)
    return of_loop + problems(prefill_chunk.lower(model, fewer, 3, params, state, start).compile(), capacity)


def careless_loop():
    """Copies are known to occur in a commit that does not depend on its reads."""
    capacity = CAPACITIES[1]
    model, params, state = abstract(capacity, track_kept=True)
    return problems(compile_loop(skipping_loop(model, count_depends_on_reads=False), params, state), capacity)


CASES = {
    **{f"decode loop, {capacity}": partial(decode_loop, capacity) for capacity in CAPACITIES},
    **{f"prefill, {capacity}": partial(prefill, capacity) for capacity in CAPACITIES},
    "score, 896": partial(score, CAPACITIES[1]),
    "draft model's chain, 224": partial(speculative_loop, CHAIN, CAPACITIES[0]),
    "draft model's chain, 896": partial(speculative_loop, CHAIN, CAPACITIES[1]),
    "draft model's tree, 896": partial(speculative_loop, TREE, CAPACITIES[1]),
    **{f"skipped layers, {capacity}": partial(loop_that_skips_layers, capacity) for capacity in CAPACITIES},
    "layer policy, 896": loop_of_a_layer_policy,
}
CARELESS = "careless loop, 896"


def found_in(case):
    """A case's problems, or the error that prevented it."""
    try:
        return case()
    except Exception:
        return [traceback.format_exc()]


if __name__ == "__main__":
    session = {"devices": jax.device_count(), "flags": os.environ.get("XLA_FLAGS", "")}
    results = {name: found_in(case) for name, case in (CASES | {CARELESS: careless_loop}).items()}
    print(json.dumps({"session": session, "results": results}))
