"""The compiled loop gives the tokens of full forwards over the whole text at every token, row by row."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import decoding
from decodax.decoding import programs
from decodax.decoding.early_exit import AllLayers
from decodax.decoding.sizes import bucket, cache_bytes, check_cache_fits
from decodax.layers.kv_cache.full import KVCache, MarkedCache
from tests.model_kinds import model_of
from tests.tiny import tiny_model

MODEL, PARAMS = tiny_model()
LENGTHS = np.array([5, 13, 1])
PROMPTS = np.random.default_rng(0).integers(0, 37, (3, 13))
NEW = 11

decode = jax.jit(decoding.autoregressive(MODEL), donate_argnums=1)


@jax.jit
def full_logits(tokens):
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return MODEL.logits(PARAMS, MODEL.apply(PARAMS, tokens, position).hidden)


@cache
def greedy(row):
    """Tokens and logprobs of a row by a full forward per token, without cache."""
    text = np.zeros((1, 32), np.int64)
    text[0, : LENGTHS[row]] = PROMPTS[row, : LENGTHS[row]]
    logprobs = []
    for end in range(LENGTHS[row], LENGTHS[row] + NEW):
        logits = np.asarray(full_logits(jnp.asarray(text)), np.float64)[0, end - 1]
        text[0, end] = logits.argmax()
        logprobs.append(logits.max() - np.log(np.exp(logits).sum()))
    return text[0, LENGTHS[row] : LENGTHS[row] + NEW], np.array(logprobs)


def start(rows=slice(None), new=NEW, params=PARAMS, **options):
    seed = np.arange(3)[rows]
    return decoding.prefill(MODEL, params, PROMPTS[rows], LENGTHS[rows], new, seed, **options)


def new_tokens(state, rows=(0, 1, 2)):
    tokens, length = np.asarray(state.tokens), np.asarray(state.length)
    return [tokens[i, LENGTHS[row] : length[i]] for i, row in enumerate(rows)]


def test_greedy_equals_full_forwards():
    state = decode(PARAMS, start())
    for row, tokens in enumerate(new_tokens(state)):
        want, logprobs = greedy(row)
        np.testing.assert_array_equal(tokens, want)
        got = np.asarray(state.logprobs)[row, LENGTHS[row] : LENGTHS[row] + NEW]
        # Logits of at most 5 in float32, summed over 37 tokens.
        np.testing.assert_allclose(got, logprobs, atol=2e-5)
    assert int(state.num_target_forwards) == NEW + 1  # one chunk of prefill
    assert np.asarray(state.done).all() and not np.asarray(state.failed).any()


def test_row_alone_gives_the_same():
    for row in range(3):
        state = decode(PARAMS, start(slice(row, row + 1)))
        np.testing.assert_array_equal(new_tokens(state, (row,))[0], greedy(row)[0])


def test_blocks_of_steps_give_the_same():
    state = start()
    for steps in (1, 3, 100):
        state = decode(PARAMS, state, steps)
    for row, tokens in enumerate(new_tokens(state)):
        np.testing.assert_array_equal(tokens, greedy(row)[0])


def test_prompt_of_several_chunks(monkeypatch):
    monkeypatch.setattr("decodax.decoding.chunked_prefill.MAX_CHUNK_TOKENS", 5)
    state = decode(PARAMS, start())
    assert int(state.num_target_forwards) == NEW + 3  # 12 tokens before the last one, 5 at a time
    for row, tokens in enumerate(new_tokens(state)):
        np.testing.assert_array_equal(tokens, greedy(row)[0])


def test_stop_tokens_and_limits_end_rows_by_themselves():
    stops = [int(greedy(0)[0][4]), int(greedy(2)[0][2])]
    limits = np.array([NEW, 3, NEW])
    state = decode(PARAMS, start(new=limits, stop_token_ids=stops))
    for row, tokens in enumerate(new_tokens(state)):
        want = greedy(row)[0][: limits[row]]
        hits = np.nonzero(np.isin(want, stops))[0]
        np.testing.assert_array_equal(tokens, want[: hits[0] + 1] if hits.size else want)


def test_cache_holds_all_tokens_but_the_last_one():
    state = decode(PARAMS, start())
    text = np.asarray(state.tokens)
    position = jnp.broadcast_to(jnp.arange(text.shape[1], dtype=jnp.int32), text.shape)
    updates = jax.jit(MODEL.apply)(PARAMS, jnp.asarray(text), position).cache_updates
    for cache_, want in zip(state.caches, updates, strict=True):
        np.testing.assert_array_equal(cache_.length, LENGTHS + NEW - 1)
        for row, length in enumerate(LENGTHS + NEW - 1):
            for got, wanted in ((cache_.key, want.key), (cache_.value, want.value)):
                written, read = np.asarray(got)[row, :, :length], np.asarray(wanted)[row, :, :length]
                np.testing.assert_allclose(written, read, atol=1e-5)


@pytest.mark.parametrize("where", ["prefill", "loop"])
def test_a_row_with_nonfinite_logits_fails_alone(where):
    """NaN in the embedding of one token: the row that emits it fails, keeps its tokens, and changes no other."""
    met_by_others = {*PROMPTS[1, :13], *greedy(1)[0], *PROMPTS[2, :1], *greedy(2)[0]}
    bad = min(set(range(37)) - met_by_others)
    prompts = PROMPTS.copy()
    prompts[0, 2 if where == "prefill" else 4] = bad  # of five tokens the last one is run in the loop
    params = {**PARAMS, "embedding": PARAMS["embedding"].at[bad].set(jnp.nan)}
    state = decode(params, decoding.prefill(MODEL, params, prompts, LENGTHS, NEW, np.arange(3)))
    np.testing.assert_array_equal(state.failed, [True, False, False])
    assert not new_tokens(state)[0].size
    for row in (1, 2):
        np.testing.assert_array_equal(new_tokens(state)[row], greedy(row)[0])


@pytest.mark.parametrize("name", ["key", "value"])
def test_a_prompt_whose_last_layer_overflows_fails(name):
    """In float16: the keys and values of the last layer go into its cache alone, and no later layer shows them."""
    half = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float16), PARAMS)
    last = half["blocks_1"]["mixer"]
    params = {**half, "blocks_1": {**half["blocks_1"], "mixer": {**last, name: np.full_like(last[name], 6e4)}}}
    state = decoding.prefill(MODEL, params, PROMPTS, LENGTHS, NEW, np.arange(3))
    np.testing.assert_array_equal(state.failed, [True, True, False])  # one token of a prompt is not prefilled
    np.testing.assert_array_equal(state.caches[1].length, 0)
    assert not np.any(start(params=half).failed)


def test_the_dtype_of_a_model_is_not_that_of_its_first_leaf():
    """Weights may have dtypes of their own: here the first in the alphabet."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), PARAMS)
    params = {"a_bias": np.zeros(3, np.float32), **params}
    assert MODEL.dtype(params) == jnp.bfloat16 and jax.tree.leaves(params)[0].dtype == np.float32
    assert start(params=params).caches[0].key.dtype == jnp.bfloat16


def test_one_compile_per_bucket(monkeypatch):
    monkeypatch.setattr(programs, "_programs", type(programs._programs)())
    traces = []

    def counted(params, state):
        traces.append(state.tokens.shape)
        return decoding.autoregressive(MODEL)(params, state)

    run = jax.jit(counted, donate_argnums=1)
    for length, new in ((9, 12), (12, 12), (10, 11), (11, 13)):  # all within a buffer of 24 and a chunk of 16
        tokens = np.random.default_rng(length).integers(0, 37, (2, length))
        run(PARAMS, decoding.prefill(MODEL, PARAMS, tokens, np.full(2, length), new, np.zeros(2, int)))
    assert traces == [(2, 24)]
    assert programs.num_programs() == 2  # the empty state, and the chunk of the prompt


def test_all_layers_prefill_with_the_same_compiled_code(monkeypatch):
    monkeypatch.setattr(programs, "_programs", type(programs._programs)())
    start()
    compiled = programs.num_programs()
    start(layer_policy=AllLayers())
    assert programs.num_programs() == compiled


class Marking(AllLayers):
    """A layer policy that needs caches with marks."""

    cache_policy = MarkedCache


def test_a_cache_policy_does_not_replace_the_one_that_a_layer_policy_needs():
    assert start(layer_policy=Marking()).caches[0].marks_tokens
    assert start(layer_policy=Marking(), cache_policy=MarkedCache).caches[0].marks_tokens
    with pytest.raises(ValueError, match=r"Marking skips layers .* got cache_policy KVCache: leave it out"):
        start(layer_policy=Marking(), cache_policy=KVCache)
    assert not start(layer_policy=AllLayers(), cache_policy=KVCache).caches[0].marks_tokens


def test_other_sampling_values_do_not_recompile():
    run = jax.jit(decoding.autoregressive(MODEL), donate_argnums=1)
    for temperature, top_p in ((0.7, 0.9), (1.3, 0.5)):
        sampling = decoding.Sampling.create(3, 37, temperature=temperature, top_p=top_p)
        run(PARAMS, start(sampling=sampling))
    assert run._cache_size() == 1


def test_buckets_waste_at_most_a_quarter():
    sizes = [bucket(size) for size in range(1, 5000)]
    assert all(0 <= got - want <= max(want / 4, 15) for want, got in enumerate(sizes, start=1))
    assert len(set(sizes)) < 40 and all(bucket(size) == size for size in set(sizes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": np.array([5, 0, 1])}, r"length must be in 1\.\.13 \(tokens of the row\), got 0 in row 1"),
        ({"length": np.array([5, 14, 1])}, "got 14 in row 1"),
        ({"tokens": np.where(PROMPTS[1, 3] == PROMPTS, 37, PROMPTS)}, r"token ids must be in 0\.\.36 .* got 37"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        (
            {"max_new_tokens": np.array([9, 500, 9])},
            r"in the model's context of 512, got 13 \+ 500 tokens in row 1: lower",
        ),
    ],
)
def test_bad_prompts(change, message):
    good = {"tokens": PROMPTS, "length": LENGTHS, "max_new_tokens": NEW, "seed": np.arange(3)}
    with pytest.raises(ValueError, match=message):
        decoding.prefill(MODEL, PARAMS, **{**good, **change})


def test_the_error_for_a_cache_that_does_not_fit_says_what_would(monkeypatch):
    per_token = 2 * 4 * 8 * (2 + 3) + 2 * 4  # keys and values of both layers in float32, and their lengths
    monkeypatch.setattr(decoding.sizes, "free_bytes", lambda: 3 * 20 * per_token)
    with pytest.raises(MemoryError, match=rf"needs {3 * (24 * 320 + 8):,} bytes.* holds 20 tokens .* or 2 rows of 24"):
        start()


@pytest.mark.parametrize("kind", ["hybrid", "recurrent"])
def test_a_recurrent_state_is_not_said_to_shrink_with_the_tokens(monkeypatch, kind):
    model, (size, of_one) = model_of(kind), (cache_bytes(model_of(kind), 3, n, jnp.float32) for n in (40, 1))
    monkeypatch.setattr(decoding.sizes, "free_bytes", lambda: size - 1)
    with pytest.raises(MemoryError) as raised:
        check_cache_fits(model, 3, 40, jnp.float32)
    message = str(raised.value)
    assert (message.endswith("split the batch.") and "or 2 rows" in message) or "holds 2 rows of 40" in message
    assert ("tokens (prompt and output)" in message) == (size > of_one) == (kind == "hybrid")
    if kind == "hybrid":
        monkeypatch.setattr(decoding.sizes, "free_bytes", lambda: of_one - 1)
        with pytest.raises(MemoryError, match=r"That holds \d rows of 40: split the batch"):
            check_cache_fits(model, 3, 40, jnp.float32)
        tokens = int(message.split("That holds ")[1].split(" tokens")[0])
        assert cache_bytes(model, 3, tokens, jnp.float32) <= size - 1 < cache_bytes(model, 3, tokens + 1, jnp.float32)


def test_prompts_and_seeds_may_be_traced():
    """Prefill and decoding in one jitted function of prompts, lengths and seeds: one program, the same tokens."""
    sampling = decoding.Sampling.create(3, 37, temperature=[0.0, 0.8, 1.2])
    decode = decoding.autoregressive(MODEL)

    @jax.jit
    def run(params, tokens, length, seed):
        return decode(params, decoding.prefill(MODEL, params, tokens, length, 7, seed, sampling=sampling))

    rows = np.random.default_rng(5).integers(0, 37, (2, 3, 11))
    for tokens, length, seed in zip(rows, ([11, 4, 1], [2, 9, 7]), ([1, 2, 3], [4, 5, 6]), strict=True):
        length = np.array(length, np.int32)
        state = decoding.prefill(MODEL, PARAMS, tokens, length, 7, np.array(seed), sampling=sampling)
        got, want = run(PARAMS, tokens, length, np.array(seed)), decode(PARAMS, state)
        np.testing.assert_array_equal(got.length, want.length)
        for row, end in enumerate(length + 7):
            np.testing.assert_array_equal(got.tokens[row, :end], want.tokens[row, :end])
    assert run._cache_size() == 1


def test_what_cannot_be_traced_is_said():
    tokens, length, seed = jnp.zeros((1, 11), jnp.int32), jnp.array([11]), jnp.array([0])
    with pytest.raises(ValueError, match="max_new_tokens must be a whole number, at least 1, where prompts"):
        jax.jit(lambda most: decoding.prefill(MODEL, PARAMS, tokens, length, most, seed))(jnp.array([7]))
    context = MODEL.config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"fit in the model's context of {context}, got 11 \+ {context} tokens"):
        jax.jit(lambda tokens: decoding.prefill(MODEL, PARAMS, tokens, length, context, seed))(tokens)
