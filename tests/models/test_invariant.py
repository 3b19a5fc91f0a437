"""The invariant mode: a token has bit-identical logits, keys and values alone and among others in one forward.

Each test compares programs that are compiled separately: one token at a time inside a loop, which commits after each,
and forwards over chains and trees, in one tile and in several. Equal means equal bits, without tolerance, except where
the mode is compared with the normal one.
"""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax import decoding
from decodax.decoding.drafters import DraftModel
from decodax.decoding.tree import Tree
from decodax.decoding.verifiers import ExactMatch
from decodax.layers.attention.mask import Causal
from decodax.layers.kv_cache.full import KVCache
from decodax.layers.kv_cache.staged import stage
from decodax.models.configs.hf_config import load_config
from decodax.models.load import find_folder
from decodax.models.model import Model, commit
from tests.speculation import disturbed
from tests.tiny import tiny_model

CAPACITY = 331  # no multiple of a block of slots
# Near the boundaries of blocks, of the windowed layer and of the cache; ragged within each batch.
LENGTHS = ((1, 63, 255), (0, 64, 325), (15, 256, 300))
CHAIN = Tree.chain(5)  # with three rows, one tile
TREE = Tree.fixed([-1, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])  # several
DTYPES = ("float32", "bfloat16")
# Where a test that takes both runs the same code.
MAINLY_BFLOAT16 = ("bfloat16", pytest.param("float32", marks=pytest.mark.slow))


@cache
def built(kind, dtype):
    """The tiny model, or two layers of the embedded one's shape (all its layers are alike), with random weights."""
    if kind == "tiny":
        model, params = tiny_model()
    else:
        config = load_config(find_folder(None))[1]
        model = Model(dataclasses.replace(config, blocks=config.blocks[:2]))
        params = model.init(jax.random.key(0))
    model = dataclasses.replace(model, invariant=True)
    return model, jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def filled(model, dtype, lengths, capacity=CAPACITY):
    """Caches of random keys and values, equal in a slot for every capacity; unfilled slots hold numbers as well."""
    caches = []
    for index, block in enumerate(model.config.blocks):
        shape = (2, len(lengths), block.mixer.layer.num_kv_heads, 400, block.mixer.layer.head_size)
        key, value = np.random.default_rng(index).normal(size=shape)[:, :, :, :capacity].astype(jnp.dtype(dtype))
        caches.append(KVCache(jnp.asarray(key), jnp.asarray(value), jnp.asarray(lengths, jnp.int32)))
    return tuple(caches)


@partial(jax.jit, static_argnums=0)
def together(model, params, token, position, caches, mask):
    """Logits and cache updates of one forward."""
    out = model.apply(params, token, position, caches, mask=mask)
    return model.logits(params, out.hidden), out.cache_updates


@partial(jax.jit, static_argnums=0)
def one_by_one(model, params, token, caches):
    """Logits of each token and the caches after all of them, a forward and a commit for each, in a compiled loop."""

    def step(index, carry):
        logits, caches = carry
        one = jax.lax.dynamic_slice_in_dim(token, index, 1, axis=1)
        out = model.apply(params, one, caches[0].length[:, None], caches)
        new = model.logits(params, out.hidden)
        caches = commit(caches, out.cache_updates, jnp.isfinite(new[:, 0, 0]).astype(jnp.int32))
        return jax.lax.dynamic_update_slice_in_dim(logits, new, index, axis=1), caches

    logits = jnp.zeros((*token.shape, model.config.vocab_size))
    return jax.lax.fori_loop(0, token.shape[1], step, (logits, caches))


def draw(model, lengths, tree, seed=0):
    """A random token at each node, and the nodes' positions."""
    token = np.random.default_rng(seed).integers(0, model.config.vocab_size, (len(lengths), tree.num_nodes))
    return jnp.asarray(token, jnp.int32), jnp.asarray(lengths, jnp.int32)[:, None] + jnp.asarray(tree.depth)


def assert_same_bits(got, want):
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def assert_paths_equal_steps(model, params, tree, lengths, dtype):
    """Every path of the tree, in one forward with all the others, equals its tokens one by one."""
    token, position = draw(model, lengths, tree)
    caches = filled(model, dtype, lengths)
    logits, updates = jax.device_get(together(model, params, token, position, caches, tree.mask()))
    for leaf in np.setdiff1d(np.arange(tree.num_nodes), tree.parent[0]):
        path = np.flatnonzero(tree.ancestors[0, leaf])
        padded = np.resize(path, CHAIN.num_nodes)  # so that paths of all lengths share compiled code
        alone, after = jax.device_get(one_by_one(model, params, np.asarray(token)[:, padded], caches))
        assert_same_bits(logits[:, path], alone[:, : len(path)])
        for kept, new in zip(after, updates, strict=True):
            for row, length in enumerate(lengths):
                slots = slice(length, length + len(path))
                assert_same_bits(new.key[row][:, path].astype(dtype), kept.key[row][:, slots])
                assert_same_bits(new.value[row][:, path].astype(dtype), kept.value[row][:, slots])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.quick_cases(1)
def test_a_token_alone_equals_the_token_among_others(dtype):
    model, params = built("tiny", dtype)
    for lengths in LENGTHS:
        assert_paths_equal_steps(model, params, CHAIN, lengths, dtype)
        assert_paths_equal_steps(model, params, TREE, lengths, dtype)


@pytest.mark.parametrize("dtype", MAINLY_BFLOAT16)
@pytest.mark.slow
def test_a_token_alone_equals_the_token_among_others_in_the_embedded_model_s_shape(dtype):
    assert_paths_equal_steps(*built("embedded", dtype), TREE, (255,), dtype)


@pytest.mark.parametrize("dtype", MAINLY_BFLOAT16)
def test_one_token_outside_a_loop_equals_the_root_of_a_chain(dtype):
    model, params = built("tiny", dtype)
    token, position = draw(model, (63,), CHAIN)
    caches = filled(model, dtype, (63,))
    wide = together(model, params, token, position, caches, Causal())[0]
    assert_same_bits(together(model, params, token[:, :1], position[:, :1], caches, Causal())[0], wide[:, :1])


@pytest.mark.parametrize("dtype", MAINLY_BFLOAT16)
def test_a_row_alone_equals_the_row_in_a_batch(dtype):
    model, params = built("tiny", dtype)
    token, position = draw(model, LENGTHS[1], TREE)
    logits, _ = together(model, params, token, position, filled(model, dtype, LENGTHS[1]), TREE.mask())
    larger = filled(model, dtype, LENGTHS[1], capacity=384)
    for row in range(3):
        own = jax.tree.map(lambda leaf: leaf[row : row + 1], larger)  # noqa: B023
        alone, _ = together(model, params, token[row : row + 1], position[row : row + 1], own, TREE.mask())
        assert_same_bits(alone, logits[row : row + 1])


@pytest.mark.slow
def test_a_chain_in_tiles_without_cache_equals_the_chain_in_pieces():
    model, params = built("tiny", "bfloat16")
    token, position = draw(model, (0, 0, 0), Tree.chain(78))
    whole, updates = together(model, params, token, position, None, Causal())
    caches = filled(model, "bfloat16", (0, 0, 0))
    for piece in (slice(0, 39), slice(39, 78)):
        logits, new = together(model, params, token[:, piece], position[:, piece], caches, Causal())
        assert_same_bits(logits, whole[:, piece])
        caches = commit(caches, new, jnp.full(3, 39))
    for kept, new in zip(caches, updates, strict=True):
        assert_same_bits(kept.key[:, :, :78], new.key)


def test_staged_tokens_equal_new_ones():
    model, params = built("tiny", "bfloat16")
    token, position = draw(model, LENGTHS[0], CHAIN)
    caches = filled(model, "bfloat16", LENGTHS[0])
    logits, updates = together(model, params, token, position, caches, Causal())
    staged = stage(caches, jax.tree.map(lambda leaf: leaf[:, :, :2], updates), position[:, :2])
    rest, _ = together(model, params, token[:, 2:], position[:, 2:], staged, Causal())
    assert_same_bits(rest, logits[:, 2:])


def test_layers_run_separately_equal_layers_run_together():
    model, params = built("tiny", "bfloat16")
    token, position = draw(model, LENGTHS[0], CHAIN)
    caches = filled(model, "bfloat16", LENGTHS[0])
    run = jax.jit(partial(model.apply, params), static_argnames=("layers", "capture"))
    whole = run(token, position, caches, capture=(0, 1))
    first = run(token, position, caches, layers=(0, 1))
    second = run(first.hidden, position, caches, layers=(1, 2))
    assert_same_bits(whole.captured[0], model.embed(params, token, token * 0))
    assert_same_bits(whole.captured[1], first.hidden)
    assert_same_bits(whole.hidden, second.hidden)
    assert_same_bits(whole.cache_updates[1].key, second.cache_updates[0].key)


def test_keys_and_values_are_read_as_a_narrower_cache_returns_them():
    model, params = built("tiny", "float32")
    with jax.numpy_dtype_promotion("standard"):
        assert_paths_equal_steps(model, params, CHAIN, LENGTHS[0], "bfloat16")


# Sums of at most 330 numbers of size about 1 in float32, added in another order, over two layers; logits of at most 5.
@pytest.mark.parametrize("tree", (CHAIN, TREE), ids=("chain", "tree"))
def test_logits_are_those_of_the_normal_mode(tree):
    model, params = built("tiny", "float32")
    for lengths in LENGTHS:
        token, position = draw(model, lengths, tree)
        caches = filled(model, "float32", lengths)
        want, _ = together(Model(model.config), params, token, position, caches, tree.mask())
        got, _ = together(model, params, token, position, caches, tree.mask())
        np.testing.assert_allclose(got, want, atol=2e-5)


ROWS, NEW = 24, 40


def decoded(model, params, drafter=None):
    """The tokens of ROWS rows, half greedy and half sampled, after NEW new ones."""
    sampling = decoding.Sampling.create(ROWS, 37, temperature=[0.0, 1.0] * (ROWS // 2))
    prompts, one = np.arange(ROWS)[:, None], np.ones(ROWS, np.int32)
    state = decoding.prefill(model, params, prompts, one, NEW, np.arange(ROWS), sampling=sampling)
    if drafter is None:
        state = jax.jit(decoding.autoregressive(model))(params, state)
    else:
        decode = decoding.speculative(model, drafter, ExactMatch())
        often_right = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), disturbed(built("tiny", "float32")[1], 0.03))
        state = jax.jit(decode)(params, often_right, state)
    return np.asarray(state.tokens)


@pytest.mark.slow
def test_speculative_tokens_are_those_of_plain_decoding_in_bfloat16():
    model, params = built("tiny", "bfloat16")
    normal = Model(model.config)
    chain, tree = DraftModel.chain(normal, 3), DraftModel.top_k(normal, [-1, 0, 0, 1, 1, 2])
    plain = decoded(model, params)
    np.testing.assert_array_equal(decoded(model, params, chain), plain)
    np.testing.assert_array_equal(decoded(model, params, tree), plain)
    # The test can fail: without the mode, some of these rows differ.
    assert (decoded(normal, params, chain) != decoded(normal, params)).any()


def test_a_nonfinite_token_reaches_only_tokens_that_attend_to_it():
    """A draft token that becomes NaN leaves the tokens before it, and other branches, as they are."""
    model, params = built("tiny", "float32")
    caches = filled(model, "float32", LENGTHS[0])
    tree = Tree.fixed([-1, 0, 0, 1, 2])

    @partial(jax.jit, static_argnums=2)
    def logits(weights, position, is_chain):
        mask = (CHAIN if is_chain else tree).mask()
        return model.logits(weights, model.apply(weights, tokens, position, caches, mask=mask).hidden)

    tokens = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32), (3, 5))
    for shape, reads_it in ((CHAIN, [2, 3, 4]), (tree, [2, 4])):
        position = caches[0].length[:, None] + jnp.asarray(shape.depth)
        nonfinite = {**params, "embedding": params["embedding"].at[2].set(jnp.nan)}
        whole, damaged = (np.asarray(logits(weights, position, shape is CHAIN)) for weights in (params, nonfinite))
        assert np.isnan(damaged[:, reads_it]).all()
        others = [node for node in range(5) if node not in reads_it]
        np.testing.assert_array_equal(damaged[:, others], whole[:, others])


def test_models_of_both_modes_differ_and_load():
    assert decodax.load(invariant=True).model == dataclasses.replace(decodax.load().model, invariant=True)
    assert decodax.load().model != decodax.load(invariant=True).model


class Other(KVCache):
    """A cache of another class, which may return keys and values changed."""


def test_other_caches_are_refused():
    model, params = built("tiny", "float32")
    caches = model.empty_cache(1, 16, "float32", Other)
    with pytest.raises(ValueError, match="KVCache"):
        model.apply(params, jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32), caches)
