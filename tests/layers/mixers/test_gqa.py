"""Attention with all options at once equals float64: norms across heads, limits, sinks, a gate, biases, a window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.attention.mask import Causal
from decodax.layers.execution import ON_THIS_DEVICE
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.norm import RMSNormConfig
from decodax.layers.rope import Rope

BATCH, TOKENS, WIDTH, HEADS, KV_HEADS, SIZE = 2, 7, 11, 6, 2, 10
TOLERANCE = 1e-5  # float32, sums of at most 60 terms of size 1
NORM = RMSNormConfig(1e-5)
ROPE = Rope(4, 100.0)
OPTIONS = {
    "per head": {"head_norm": NORM, "sinks": True, "output_gate": True, "window": 3, "softcap": 2.0},
    "across heads": {"head_norm": NORM, "norm_across_heads": True, "clip": 0.8, "qkv_bias": True, "out_bias": True},
    "gate and biases": {"output_gate": True, "qkv_bias": True, "clip": 0.5},
}


def normed(values, weight):
    return values / np.sqrt((values**2).mean(axis=-1, keepdims=True) + NORM.eps) * weight


def rotated(heads):
    """[T, heads, size] at positions 0, 1, ...: pairs (0, 2) and (1, 3) turn, the rest does not."""
    turned = heads.copy()
    for token, pair in np.ndindex(TOKENS, 2):
        angle = token * ROPE.base ** (-2 * pair / 4)
        first, second = heads[token, :, pair], heads[token, :, pair + 2]
        turned[token, :, pair] = first * np.cos(angle) - second * np.sin(angle)
        turned[token, :, pair + 2] = second * np.cos(angle) + first * np.sin(angle)
    return turned


def expected(config, weight, inputs):
    """One row, [T, D], by loops over heads and tokens."""

    def projected(name):
        flat = inputs @ weight[name].T + weight.get(f"{name}_bias", 0.0)
        if name == "query" and config.output_gate:
            pairs = flat.reshape(TOKENS, HEADS, 2, SIZE)
            return pairs[:, :, 0].reshape(TOKENS, -1), pairs[:, :, 1].reshape(TOKENS, -1)
        return flat, None

    def heads(name):
        flat = projected(name)[0]
        if config.head_norm is not None and name != "value":
            scale = weight[f"{name}_norm"]["weight"]
            by_head = flat if config.norm_across_heads else flat.reshape(TOKENS, -1, SIZE)
            flat = normed(by_head, scale).reshape(TOKENS, -1)
        if config.clip is not None:
            flat = np.clip(flat, -config.clip, config.clip)
        return flat.reshape(TOKENS, -1, SIZE)

    query, key, value = rotated(heads("query")), rotated(heads("key")), heads("value")
    mixed = np.zeros((TOKENS, HEADS, SIZE))
    for token, head in np.ndindex(TOKENS, HEADS):
        first = 0 if config.window is None else max(token - config.window + 1, 0)
        score = key[first : token + 1, head // 3] @ query[token, head] * config.scale
        score = score if config.softcap is None else config.softcap * np.tanh(score / config.softcap)
        share = np.exp(score)
        total = share.sum() + (np.exp(weight["sinks"][head]) if config.sinks else 0.0)
        mixed[token, head] = share / total @ value[first : token + 1, head // 3]
    flat = mixed.reshape(TOKENS, -1)
    if config.output_gate:
        flat = flat / (1 + np.exp(-projected("query")[1]))
    return flat @ weight["out"].T + weight.get("out_bias", 0.0)


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_definition(name):
    config = GQAConfig(HEADS, KV_HEADS, SIZE, ROPE, scale=0.3, **OPTIONS[name])
    random = np.random.default_rng(0)

    def draw(described):
        noise = random.normal(size=described.shape) * described.shape[-1] ** -0.5
        return noise if described.init == "normal" else 1 + noise

    weights = jax.tree.map(draw, config.weights(WIDTH))
    inputs = random.normal(size=(BATCH, TOKENS, WIDTH))
    module = config.module(WIDTH, "mixer", ON_THIS_DEVICE)
    position = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), (BATCH, TOKENS))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), weights)
    run = jax.jit(lambda x: module.apply({"params": params}, x, position, position + 1, None, Causal())[0])
    got = run(jnp.asarray(inputs, jnp.float32))
    for row in range(BATCH):
        want = expected(config, weights, inputs[row])
        np.testing.assert_allclose(got[row], want, atol=TOLERANCE * np.abs(want).max())
