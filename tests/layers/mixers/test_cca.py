"""Attention with convolutions equals zaya's formula, and attention where its convolutions do nothing."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.core.weight import Weight
from decodax.layers.attention.mask import Causal
from decodax.layers.execution import ON_THIS_DEVICE
from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.head_norms import HeadNorms
from decodax.layers.kv_cache.full import MarkedCache
from decodax.layers.mixers.cca import CCAConfig
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.norm import RMSNormConfig
from decodax.layers.rope import Rope
from decodax.models.config import ModelConfig, pre_norm_block
from decodax.models.model import Model
from tests.oracles.convolutional_attention import convolutional_attention

HEADS, KV_HEADS, SIZE, ROTARY, WIDTH = 6, 2, 5, 4, 11
BATCH, CAPACITY = 2, 24
PLAIN = CCAConfig(HEADS, KV_HEADS, SIZE, Rope(ROTARY, 100.0), 0.4)
BIASED = dataclasses.replace(PLAIN, depthwise_width=3, bias=True)
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


def hidden_states(num_tokens):
    return np.random.default_rng(1).standard_normal((BATCH, num_tokens, WIDTH)).astype(np.float32)


def positions(num_tokens):
    return np.broadcast_to(np.arange(num_tokens, dtype=np.int32), (BATCH, num_tokens))


@pytest.mark.parametrize("config", [PLAIN, BIASED], ids=["plain", "biased"])
def test_is_the_formula(config):
    params, hidden = parameters(config), hidden_states(16)
    got, _ = run(config, params, hidden, positions(16), None, Causal())
    for row in range(BATCH):
        np.testing.assert_allclose(got[row], expected(config, params, hidden[row]), atol=TOLERANCE)


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
    gqa = GQAConfig(
        HEADS, KV_HEADS, SIZE, PLAIN.rope, 0.4, head_norms=HeadNorms(RMSNormConfig(0.0), RMSNormConfig(0.0)), window=6
    )
    hidden, position = hidden_states(9), positions(9)
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
    block = pre_norm_block(PLAIN, GatedMLPConfig(17), RMSNormConfig(1e-5))
    with pytest.raises(ValueError, match="no invariant mode: convolutions read tokens"):
        Model(ModelConfig(19, WIDTH, CAPACITY, (block,), RMSNormConfig(1e-5), False), invariant=True)
