"""Attention with all options equals float64: positions, norms, limits, sinks, a gate, biases, a window."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.alibi import Alibi
from decodax.layers.attention.mask import Causal
from decodax.layers.execution import ON_THIS_DEVICE
from decodax.layers.head_norms import HeadNorms
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.norm import RMSNormConfig
from decodax.layers.rope import Rope

BATCH, TOKENS, WIDTH, HEADS, KV_HEADS, SIZE = 2, 7, 11, 6, 2, 10
TOLERANCE = 1e-5  # float32, sums of at most 60 terms of size 1
NORM = RMSNormConfig(1e-5)
NO_WEIGHT = RMSNormConfig(1e-5, has_weight=False)
ROPE = Rope(4, 100.0)
ACROSS_HEADS = HeadNorms(NORM, NORM, across_heads=True)
OPTIONS = {
    "per head": {"head_norms": HeadNorms(NORM, NORM), "sinks": True, "output_gate": True, "window": 3, "softcap": 2.0},
    "across heads": {
        "head_norms": HeadNorms(NORM, NORM, across_heads=True),
        "clip": 0.8,
        "qkv_bias": True,
        "out_bias": True,
    },
    "gate and biases": {"output_gate": True, "qkv_bias": True, "clip": 0.5},
    "alibi": {"positions": Alibi(4.0, 0.7), "sinks": True, "window": 5},
    "no positions": {"positions": None},
    "neighbours": {"positions": replace(ROPE, interleaved=True), "head_norms": HeadNorms(NORM, None)},
    "values are keys": {"head_norms": HeadNorms(NORM, NORM, NO_WEIGHT), "values_are_keys": True, "clip": 0.9},
    "norms after the rotation": {"head_norms": HeadNorms(None, NORM, NORM, after_rotation=True), "qkv_bias": True},
}


def normed(values, weight):
    return values / np.sqrt((values**2).mean(axis=-1, keepdims=True) + NORM.eps) * weight


def rotated(heads, positions):
    """[T, heads, size] at positions 0, 1, ...: pairs (0, 2), (1, 3), or neighbours; the rest does not turn."""
    turned = heads.copy()
    if not isinstance(positions, Rope):
        return turned
    for token, pair in np.ndindex(TOKENS, 2):
        one, other = (2 * pair, 2 * pair + 1) if positions.interleaved else (pair, pair + 2)
        angle = token * positions.base ** (-2 * pair / 4)
        first, second = heads[token, :, one], heads[token, :, other]
        turned[token, :, one] = first * np.cos(angle) - second * np.sin(angle)
        turned[token, :, other] = second * np.cos(angle) + first * np.sin(angle)
    return turned


def expected(config, weight, inputs):
    """One row, [T, D], by loops over heads and tokens."""

    def projected(name):
        flat = inputs @ weight[name].T + weight.get(f"{name}_bias", 0.0)
        if name == "query" and config.output_gate:
            pairs = flat.reshape(TOKENS, HEADS, 2, SIZE)
            return pairs[:, :, 0].reshape(TOKENS, -1), pairs[:, :, 1].reshape(TOKENS, -1)
        return flat, None

    norms = config.head_norms

    def with_norm(name, flat):
        if norms is None or getattr(norms, name) is None:
            return flat
        scale = weight[f"{name}_norm"]["weight"] if f"{name}_norm" in weight else 1.0
        by_head = flat if norms.across_heads else flat.reshape(TOKENS, -1, SIZE)
        return normed(by_head, scale).reshape(TOKENS, -1)

    def heads(name):
        source = "key" if name == "value" and config.values_are_keys else name
        flat, turns = projected(source)[0], name != "value"
        if not (turns and norms is not None and norms.after_rotation):
            flat = with_norm(name, flat)
        if config.clip is not None:
            flat = np.clip(flat, -config.clip, config.clip)
        if turns:
            flat = rotated(flat.reshape(TOKENS, -1, SIZE), config.positions).reshape(TOKENS, -1)
        if turns and norms is not None and norms.after_rotation:
            flat = with_norm(name, flat)
        return flat.reshape(TOKENS, -1, SIZE)

    query, key, value = heads("query"), heads("key"), heads("value")
    slopes = np.zeros(HEADS)
    if isinstance(config.positions, Alibi):  # of 4 heads, then every second of those of 8
        exponents = config.positions.max_bias * np.array([1 / 4, 2 / 4, 3 / 4, 4 / 4, 1 / 8, 3 / 8])
        slopes = config.positions.scale * 2.0**-exponents
    mixed = np.zeros((TOKENS, HEADS, SIZE))
    for token, head in np.ndindex(TOKENS, HEADS):
        first = 0 if config.window is None else max(token - config.window + 1, 0)
        score = key[first : token + 1, head // 3] @ query[token, head] * config.scale
        score = score + slopes[head] * (np.arange(first, token + 1) - token)
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
    config = GQAConfig(HEADS, KV_HEADS, SIZE, **({"positions": ROPE, "scale": 0.3} | OPTIONS[name]))
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
