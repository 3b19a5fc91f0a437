"""Factorised queries over one shared key and value equal the formula: with a cache, in trees, in the invariant mode."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.core.weight import Weight
from decodax.layers.attention.mask import Ancestors, Causal
from decodax.layers.execution import ON_THIS_DEVICE
from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.kv_cache.staged import Staged
from decodax.layers.mixers.mfa import MFAConfig
from decodax.layers.norm import RMSNormConfig
from decodax.layers.rope import Rope
from decodax.models.config import BlockConfig, ModelConfig
from decodax.models.model import Model, commit
from tests.oracles.attention import attention
from tests.oracles.latent_attention import rms_norm, rotated

HEADS, SIZE, RANK, WIDTH, EPS, CAPACITY = 5, 6, 7, 11, 1e-5, 24
CONFIG = MFAConfig(HEADS, SIZE, RANK, Rope(4, 100.0), 0.4, RMSNormConfig(EPS))
LENGTHS = np.array([0, 9])
PARENTS = np.array([-1, 0, 0, 2, 1])
DEPTHS = np.array([0, 1, 1, 2, 2])
# Projections of 11 and attention over at most 12 tokens, in float32 against float64.
TOLERANCE = 1e-5


def parameters():
    random = np.random.default_rng(0)

    def draw(weight):
        size = weight.shape[-1] ** -0.5 if weight.init == "normal" else 0.5
        return jnp.asarray(random.standard_normal(weight.shape) * size + (weight.init == "ones"), jnp.float32)

    return jax.tree.map(draw, CONFIG.weights(WIDTH), is_leaf=lambda leaf: isinstance(leaf, Weight))


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
def run(params, hidden, position, cache, mask):
    module = CONFIG.module(WIDTH, "mixer", ON_THIS_DEVICE)
    return module.apply({"params": params}, hidden, position, position + 1, cache, mask)


def test_chunks_trees_and_staged_tokens_are_the_formula():
    params, random = parameters(), np.random.default_rng(1)
    before, nodes = (
        random.standard_normal((2, size, WIDTH)).astype(np.float32) for size in (LENGTHS.max(), len(PARENTS))
    )
    position = jnp.broadcast_to(jnp.arange(LENGTHS.max()), before.shape[:2])
    out, update = run(params, before, position, None, Causal())
    for row in range(2):
        np.testing.assert_allclose(out[row], expected(params, before[row]), atol=TOLERANCE)
    cache = CONFIG.empty_cache(2, CAPACITY, jnp.float32).commit(update, jnp.asarray(LENGTHS))
    want = np.zeros(nodes.shape)
    for row, length in enumerate(LENGTHS):
        for node, path in enumerate(([0], [0, 1], [0, 2], [0, 2, 3], [0, 1, 4])):
            want[row, node] = expected(params, np.concatenate([before[row, :length], nodes[row, path]]))[-1]
    position = jnp.asarray(LENGTHS[:, None] + DEPTHS)
    ancestors = Ancestors.from_parents(jnp.asarray(PARENTS[None]))
    got, update = run(params, nodes, position, cache, ancestors)
    np.testing.assert_allclose(got, want, atol=TOLERANCE)
    staged = CONFIG.empty_update(2, 2, jnp.float32).place(
        jax.tree.map(lambda leaf: leaf[:, :, :2], update), jnp.arange(2)
    )
    mask = Ancestors(ancestors.allowed[:, 2:])
    got, _ = run(params, nodes[:, 2:], position[:, 2:], Staged(cache, staged, position[:, :2]), mask)
    np.testing.assert_allclose(got, want[:, 2:], atol=TOLERANCE)


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
    config = ModelConfig(19, WIDTH, CAPACITY, (BlockConfig(CONFIG, GatedMLPConfig(17), norm),), norm, False)
    model = Model(config, invariant=True)
    params, tokens = model.init(jax.random.key(0)), jnp.arange(4)[None]
    apply = jax.jit(partial(model.apply, params))
    at_once = apply(tokens, tokens).hidden
    caches = model.empty_cache(1, CAPACITY, jnp.float32)
    first = apply(tokens[:, :3], tokens[:, :3], caches)
    last = apply(tokens[:, 3:], tokens[:, 3:], commit(caches, first.cache_updates, jnp.array([3]))).hidden
    np.testing.assert_array_equal(last[:, 0], at_once[:, 3])


def test_rotates_no_more_than_a_head():
    with pytest.raises(ValueError, match="at most the head size 6, got 8"):
        MFAConfig(HEADS, SIZE, RANK, Rope(8, 100.0), 0.4, RMSNormConfig(EPS))
