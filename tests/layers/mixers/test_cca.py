"""Attention with convolutions equals zaya's formula in chunks, on the paths of trees, staged or committed."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.core.weight import Weight
from decodax.layers.attention.mask import Ancestors, Causal
from decodax.layers.execution import ON_THIS_DEVICE
from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.kv_cache.full import MarkedCache
from decodax.layers.kv_cache.staged import Staged
from decodax.layers.kv_cache.tailed import TailedUpdate
from decodax.layers.mixers.cca import CCAConfig
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.norm import RMSNormConfig
from decodax.layers.rope import Rope
from decodax.models.config import BlockConfig, ModelConfig
from decodax.models.model import Model
from tests.oracles.convolutional_attention import convolutional_attention

HEADS, KV_HEADS, SIZE, ROTARY, WIDTH = 6, 2, 5, 4, 11
BATCH, CAPACITY = 3, 24
LENGTHS = np.array([0, 1, 9])
PLAIN = CCAConfig(HEADS, KV_HEADS, SIZE, Rope(ROTARY, 100.0), 0.4)
BIASED = dataclasses.replace(PLAIN, depthwise_width=3, bias=True)
PARENTS = np.array([-1, 0, 0, 2, 1, 3, 5])
DEPTHS = np.array([0, 1, 1, 2, 2, 3, 4])
# Projections of 11, convolutions of 10 to 15, attention over at most 16 tokens, in float32 against float64.
TOLERANCE = 1e-5


def parameters(config, seed=0):
    random = np.random.default_rng(seed)

    def draw(weight):
        size = weight.shape[-1] ** -0.5 if weight.init == "normal" else 0.5
        return jnp.asarray(random.standard_normal(weight.shape) * size + (weight.init == "ones"), jnp.float32)

    return jax.tree.map(draw, config.weights(WIDTH), is_leaf=lambda leaf: isinstance(leaf, Weight))


def expected(config, params, hidden):
    """The oracle's outputs for one row of tokens, each of which attends to all before it."""
    names = {
        "query": "q_proj", "key": "k_proj", "value": "v_proj_current", "delayed_value": "v_proj_delayed",
        "depthwise": "conv_qk_depthwise", "grouped": "conv_qk_grouped", "out": "o_proj",
    }  # fmt: skip
    weights = {"temp": params["key_temperature"]}
    for name, leaf in params.items():
        base = name.removesuffix("_bias")
        if base in names:
            weights[f"{names[base]}.{'weight' if base == name else 'bias'}"] = leaf
    for kind in ("depthwise", "grouped"):
        weight, taps = params[kind], getattr(config, f"{kind}_width")
        weights[f"conv_qk_{kind}.weight"] = np.reshape(weight, (len(weight), -1, taps))
    frequency = 100.0 ** (-np.arange(ROTARY // 2) / (ROTARY // 2))
    return convolutional_attention(
        weights, hidden, (HEADS, KV_HEADS, SIZE), scale=config.scale, inverse_frequency=frequency
    )


@partial(jax.jit, static_argnums=0)
def run(config, params, hidden, position, cache, mask):
    module = config.module(hidden.shape[2], "mixer", ON_THIS_DEVICE)
    return module.apply({"params": params}, hidden, position, position + 1, cache, mask)


commit = jax.jit(lambda cache, update, count, path=None: cache.commit(update, count, path))


def hidden_states(num_tokens, batch=BATCH, seed=1):
    return np.random.default_rng(seed).standard_normal((batch, num_tokens, WIDTH)).astype(np.float32)


def positions(first, num_tokens):
    return jnp.asarray(np.reshape(first, (-1, 1)) + np.arange(num_tokens), jnp.int32)


@pytest.mark.parametrize("config", [PLAIN, BIASED], ids=["plain", "biased"])
def test_a_row_in_chunks_of_any_size_equals_the_formula(config):
    """At once, in chunks shorter and longer than a tail, token by token, alone and in a batch."""
    params, hidden = parameters(config), hidden_states(16, batch=2)
    want = np.stack([expected(config, params, row) for row in hidden])
    at_once, _ = run(config, params, hidden, positions([0, 0], 16), None, Causal())
    np.testing.assert_allclose(at_once, want, atol=TOLERANCE)
    cache, start, got = config.empty_cache(2, CAPACITY, jnp.float32), 0, []
    for size in (1, 1, 2, 7, 1, 4):
        chunk = hidden[:, start : start + size]
        out, update = run(config, params, chunk, positions([start, start], size), cache, Causal())
        cache, start = commit(cache, update, jnp.array([size, size])), start + size
        got.append(out)
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=TOLERANCE)
    alone, _ = run(config, params, hidden[1:], positions([0], 16), None, Causal())
    np.testing.assert_allclose(alone[0], want[1], atol=TOLERANCE)


def tree_operands(config, params):
    """Rows of unequal length, each with a tree after it, and what the formula gives for each node's path."""
    before, nodes = hidden_states(LENGTHS.max()), hidden_states(len(PARENTS), seed=2)
    _, update = run(config, params, before, positions(np.zeros(BATCH), LENGTHS.max()), None, Causal())
    cache = commit(config.empty_cache(BATCH, CAPACITY, jnp.float32), update, jnp.asarray(LENGTHS))
    want = np.zeros((BATCH, len(PARENTS), WIDTH))
    for row, length in enumerate(LENGTHS):
        for node in range(len(PARENTS)):
            path = [node]
            while PARENTS[path[0]] >= 0:
                path.insert(0, PARENTS[path[0]])
            want[row, node] = expected(config, params, np.concatenate([before[row, :length], nodes[row, path]]))[-1]
    return nodes, jnp.asarray(LENGTHS[:, None] + DEPTHS), cache, want


@pytest.mark.parametrize("config", [PLAIN, BIASED], ids=["plain", "biased"])
def test_trees_and_staged_tokens(config):
    """A node's output is that of its path, whether its ancestors are of the same forward, staged, or committed."""
    params = parameters(config)
    nodes, position, cache, want = tree_operands(config, params)
    ancestors = Ancestors.from_parents(jnp.asarray(PARENTS[None]))
    got, update = run(config, params, nodes, position, cache, ancestors & Causal())
    np.testing.assert_allclose(got, want, atol=TOLERANCE)

    order, allowed = np.array([1, 0, 3, 4]), np.zeros((1, 3, 8), bool)  # slot of each of the first four nodes
    allowed[:, :, order] = ancestors.allowed[:, 4:, :4]
    allowed[:, :, 5:] = ancestors.allowed[:, 4:, 4:]
    buffer = config.empty_update(BATCH, 5, jnp.float32)
    buffer = dataclasses.replace(buffer, columns=buffer.columns.at[:, 2].set(jnp.nan))  # masked
    first = TailedUpdate(jax.tree.map(lambda leaf: leaf[:, :, :4], update.kv), update.columns[:, :4])
    staged = buffer.place(first, jnp.asarray(order))
    place = np.array([1, 0, 0, 2, 3])  # node at each slot
    staged, mask = Staged(cache, staged, position[:, place]), Ancestors(jnp.asarray(allowed))
    got, _ = run(config, params, nodes[:, 4:], position[:, 4:], staged, mask)
    np.testing.assert_allclose(got, want[:, 4:], atol=TOLERANCE)
    alone = jax.tree.map(lambda leaf: leaf[:1], dataclasses.replace(staged, cache=None))
    got, _ = run(config, params, nodes[:1, 4:], position[:1, 4:], alone, mask)
    np.testing.assert_allclose(got, want[:1, 4:], atol=TOLERANCE)  # the first row has nothing before its tree

    committed = commit(cache, update, jnp.array([4, 0, 4]), jnp.array([[0, 2, 3, 5]] * BATCH))
    got, _ = run(config, params, nodes[:, 6:], position[:, 6:], committed, Causal())
    np.testing.assert_allclose(got[::2], want[::2, 6:], atol=TOLERANCE)
    np.testing.assert_array_equal(committed.tail[1], cache.tail[1])


def test_nonfinite_tokens_reach_only_tokens_that_attend_to_them():
    params = parameters(PLAIN)
    nodes, position, cache, want = tree_operands(PLAIN, params)
    nodes[0, 2] = np.nan
    nonfinite = dataclasses.replace(cache, tail=cache.tail.at[1].set(jnp.nan))
    mask = Ancestors.from_parents(jnp.asarray(PARENTS[None])) & Causal()
    got, _ = run(PLAIN, params, nodes, position, nonfinite, mask)
    assert np.isnan(got[1]).all() and np.isnan(got[0, [2, 3, 5, 6]]).all()
    np.testing.assert_allclose(got[2], want[2], atol=TOLERANCE)
    np.testing.assert_allclose(got[0, [0, 1, 4]], want[0, [0, 1, 4]], atol=TOLERANCE)


def test_without_convolutions_it_is_attention_with_normed_heads():
    """Identity convolutions, and query heads equal to their key's, so that the means change only norms."""
    config, random = dataclasses.replace(PLAIN, window=6), np.random.default_rng(4)
    group = HEADS // KV_HEADS
    key = random.standard_normal((KV_HEADS, SIZE, WIDTH))
    query, key = (jnp.asarray(np.reshape(heads, (-1, WIDTH)), jnp.float32) for heads in (np.repeat(key, group, 0), key))
    value, out = (
        jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((SIZE, WIDTH), (WIDTH, HEADS * SIZE))
    )
    channels = config.num_convolved
    params = {
        "query": query, "key": key, "value": value, "delayed_value": jnp.zeros((SIZE, WIDTH)), "out": out,
        "depthwise": jnp.zeros((channels, 2)).at[:, 1].set(1.0), "depthwise_bias": jnp.zeros(channels),
        "grouped": jnp.tile(jnp.stack([jnp.zeros((SIZE, SIZE)), jnp.eye(SIZE)], axis=2).reshape(SIZE, -1), (8, 1)),
        "grouped_bias": jnp.zeros(channels), "key_temperature": jnp.ones(KV_HEADS),
    }  # fmt: skip
    norm = {"weight": jnp.ones(SIZE)}
    plain = {"query": query, "key": key, "value": jnp.concatenate([value, jnp.zeros((SIZE, WIDTH))]), "out": out}
    gqa = GQAConfig(HEADS, KV_HEADS, SIZE, PLAIN.rope, 0.4, head_norm=RMSNormConfig(0.0), window=6)
    hidden, position = hidden_states(9), positions(np.zeros(BATCH), 9)
    got, update = run(config, params, hidden, position, None, Causal())
    want, plain_update = run(gqa, plain | {"query_norm": norm, "key_norm": norm}, hidden, position, None, Causal())
    np.testing.assert_allclose(got, want, atol=2 * TOLERANCE)
    np.testing.assert_allclose(update.kv.key, plain_update.key, atol=TOLERANCE)


def test_bytes_per_token_are_those_of_keys_and_values():
    """ZAYA1 (its config): 2 key-value heads of 128; the tail is the same for caches of any capacity."""
    mixer = CCAConfig(8, 2, 128, Rope(64, 1e6), 128**-0.5)

    def cache_bytes(capacity):
        cache = jax.eval_shape(lambda: mixer.empty_cache(1, capacity, jnp.bfloat16))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))

    assert cache_bytes(256) - cache_bytes(128) == 128 * 2 * 2 * 128 * 2
    assert cache_bytes(0) == 2 * 2 * (10 * 128 + 128) + 4  # two tokens' queries, keys and delayed values; the length


def test_unsupported_options_are_refused():
    with pytest.raises(ValueError, match="has to run for every token"):
        PLAIN.empty_cache(1, 8, jnp.float32, MarkedCache)
    for changes, words in (
        ({"num_kv_heads": 4}, "multiple of num_kv_heads"),
        ({"num_kv_heads": 3}, "two halves"),
        ({"rope": Rope(6, 1e4)}, "at most the head size"),
        ({"depthwise_width": 1, "grouped_width": 1}, "the token before"),
    ):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(PLAIN, **changes)
    block = BlockConfig(PLAIN, GatedMLPConfig(17), RMSNormConfig(1e-5))
    model = Model(ModelConfig(19, WIDTH, CAPACITY, (block,), RMSNormConfig(1e-5), False), invariant=True)
    params, tokens = model.init(jax.random.key(0)), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="no invariant mode"):
        model.apply(params, tokens, tokens)
    with pytest.raises(ValueError, match=r"the invariant mode needs caches .* got TailedCache"):
        model.apply(params, tokens, tokens, model.empty_cache(1, CAPACITY, jnp.float32))
