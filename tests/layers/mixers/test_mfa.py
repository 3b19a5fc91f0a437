"""Factorised queries over one shared key and value equal the formula, in the invariant mode, too."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.core.weight import Weight
from decodax.layers.attention.mask import Causal
from decodax.layers.execution import ON_THIS_DEVICE
from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.mixers.mfa import MFAConfig
from decodax.layers.norm import RMSNormConfig
from decodax.layers.rope import Rope
from decodax.models.config import ModelConfig, pre_norm_block
from decodax.models.model import Model, commit
from tests.oracles.attention import attention
from tests.oracles.latent_attention import rms_norm, rotated

HEADS, SIZE, RANK, WIDTH, EPS, CAPACITY = 5, 6, 7, 11, 1e-5, 24
CONFIG = MFAConfig(HEADS, SIZE, RANK, Rope(4, 100.0), 0.4, RMSNormConfig(EPS))
# Projections of 11 and attention over at most 9 tokens, in float32 against float64.
TOLERANCE = 1e-5


def parameters(described):
    random = np.random.default_rng(0)

    def draw(weight):
        size = weight.shape[-1] ** -0.5 if weight.init == "normal" else 0.5
        return jnp.asarray(random.standard_normal(weight.shape) * size + (weight.init == "ones"), jnp.float32)

    return jax.tree.map(draw, described, is_leaf=lambda leaf: isinstance(leaf, Weight))


def expected(params, hidden):
    """Multi-query attention in NumPy float64: every token of one row, [M, D], attends to those up to itself."""
    params, hidden = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params), np.asarray(hidden, np.float64)
    position, frequency = np.arange(len(hidden)), 100.0 ** (-np.arange(2) / 2)

    def turned(heads):
        return np.concatenate([rotated(heads[..., :4], position, frequency, 1.0, False), heads[..., 4:]], axis=-1)

    compressed = rms_norm(hidden @ params["query_down"].T, params["query_norm"]["weight"], EPS)
    queries = turned((compressed @ params["query_up"].T).reshape(len(hidden), HEADS, SIZE))
    keys, values = turned((hidden @ params["key"].T)[:, None]), (hidden @ params["value"].T)[:, None]
    mixed = [attention(query, keys, values, position <= token, CONFIG.scale) for token, query in enumerate(queries)]
    return np.reshape(mixed, (len(hidden), -1)) @ params["out"].T


@jax.jit
def run(params, hidden, position):
    module = CONFIG.module(WIDTH, "mixer", ON_THIS_DEVICE)
    return module.apply({"params": params}, hidden, position, position + 1, None, Causal())[0]


def test_is_the_formula():
    params = parameters(CONFIG.weights(WIDTH))
    hidden = np.random.default_rng(1).standard_normal((2, 9, WIDTH)).astype(np.float32)
    position = np.broadcast_to(np.arange(9, dtype=np.int32), hidden.shape[:2])
    got = run(params, hidden, position)
    for row in range(2):
        np.testing.assert_allclose(got[row], expected(params, hidden[row]), atol=TOLERANCE)


def test_bytes_are_those_of_one_key_and_one_value():
    """Step-3 (its config): 61 layers with one head of 256, 512 numbers a token and layer."""
    mixer = MFAConfig(64, 256, 2048, Rope(256, 5e5), 1 / 16, RMSNormConfig(1e-5))
    cache = jax.eval_shape(lambda: mixer.empty_cache(1, 128, jnp.bfloat16))
    assert (cache.key.size + cache.value.size) * 2 == 128 * 512 * 2
    shapes = {name: weight.shape for name, weight in mixer.weights(7168).items() if isinstance(weight, Weight)}
    assert shapes == {
        "query_down": (2048, 7168), "query_up": (64 * 256, 2048), "key": (256, 7168), "value": (256, 7168),
        "out": (7168, 64 * 256),
    }  # fmt: skip


def test_runs_in_the_invariant_mode():
    norm = RMSNormConfig(EPS)
    config = ModelConfig(19, WIDTH, CAPACITY, (pre_norm_block(CONFIG, GatedMLPConfig(17), norm),), norm, False)
    model = Model(config, invariant=True)
    params, tokens = parameters(config.weights()), np.arange(4)[None]
    apply = jax.jit(partial(model.apply, params))
    at_once = apply(tokens, tokens).hidden
    caches = model.empty_cache(1, CAPACITY, jnp.float32)
    first = apply(tokens[:, :3], tokens[:, :3], caches)
    last = apply(tokens[:, 3:], tokens[:, 3:], commit(caches, first.cache_updates, jnp.array([3]))).hidden
    np.testing.assert_array_equal(last[:, 0], at_once[:, 3])


def test_rotates_no_more_than_a_head():
    with pytest.raises(ValueError, match="at most the head size 6, got 8"):
        MFAConfig(HEADS, SIZE, RANK, Rope(8, 100.0), 0.4, RMSNormConfig(EPS))
