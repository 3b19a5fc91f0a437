"""Latent attention is the formula of deepseek_v3, in both forms, and its cache is written in place."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.core.weight import Weight
from decodax.layers.attention.mask import Causal, Window
from decodax.layers.execution import ON_THIS_DEVICE
from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.kv_cache.full import KVCache, MarkedCache
from decodax.layers.mixers.mla import MLAConfig
from decodax.layers.norm import RMSNormConfig
from decodax.layers.rope import Rope, YarnScaling
from decodax.models.config import ModelConfig, pre_norm_block
from decodax.models.model import Model
from tests.oracles.latent_attention import latent_attention

HEADS, NOPE, ROPE, VALUE, RANK, WIDTH, EPS = 3, 5, 4, 7, 11, 13, 1e-5
BATCH, CAPACITY = 3, 40
LENGTHS = np.array([0, 6, 19])
YARN = YarnScaling(factor=4.0, original_length=8, attention_factor=1.3, beta_fast=1.5, beta_slow=0.2)
NORM = RMSNormConfig(EPS)
PLAIN = MLAConfig(HEADS, NOPE, VALUE, RANK, None, Rope(ROPE, 100.0, interleaved=True), 0.35, NORM)
COMPRESSED = dataclasses.replace(PLAIN, query_rank=8, bias=True, rope=Rope(ROPE, 100.0))
STRETCHED = dataclasses.replace(COMPRESSED, rope=Rope(ROPE, 100.0, YARN, interleaved=True), scale=0.6)
CONFIGS = {"plain": PLAIN, "query_rank": COMPRESSED, "yarn": STRETCHED}
# Projections of 13, attention over at most 40 tokens, in float32 against float64: some 100 units of 2^-24.
TOLERANCE = 1e-5


def parameters(config, width=WIDTH, seed=0):
    """Weights of size one per output, so that scores differ; norms and biases that are not neutral."""
    random = np.random.default_rng(seed)

    def draw(weight):
        size = weight.shape[-1] ** -0.5 if weight.init == "normal" else 0.5
        return jnp.asarray(random.standard_normal(weight.shape) * size + (weight.init == "ones"), jnp.float32)

    return jax.tree.map(draw, config.weights(width), is_leaf=lambda leaf: isinstance(leaf, Weight))


def as_in_files(config, params):
    """By the names of a checkpoint, keys and values of each head side by side."""
    names = {
        "query": "q_proj", "query_down": "q_a_proj", "query_norm": "q_a_layernorm", "query_up": "q_b_proj",
        "latent_down": "kv_a_proj_with_mqa", "latent_norm": "kv_a_layernorm", "out": "o_proj",
    }  # fmt: skip
    weights = {}
    for name, leaf in params.items():
        base = name.removesuffix("_bias")
        if base in names:
            kind = "weight" if base == name else "bias"
            weights[f"{names[base]}.{kind}"] = leaf["weight"] if isinstance(leaf, dict) else leaf
    ups = [np.reshape(params[name], (config.num_heads, -1, config.latent_rank)) for name in ("key_up", "value_up")]
    return weights | {"kv_b_proj.weight": np.concatenate(ups, axis=1).reshape(-1, config.latent_rank)}


def expected(config, params, hidden, position):
    """The oracle's outputs for one row of tokens, each of which reads all before it."""
    half = ROPE // 2
    inverse_frequency, magnitude = 100.0 ** (-np.arange(half) / half), 1.0
    if config.rope.scaling is not None:
        # YaRN's ramp over pairs 0 and 1 goes from pair -1 (1.5 turns in 8 tokens) to 1 (0.2 turns), cut off at 0.
        divided, magnitude = np.array([0.0, 1.0]), 1.3
        inverse_frequency = inverse_frequency * (1 - divided) + inverse_frequency / 4 * divided
    return latent_attention(
        as_in_files(config, params), hidden, position, (HEADS, NOPE, ROPE, VALUE, RANK), scale=config.scale, eps=EPS,
        inverse_frequency=inverse_frequency, magnitude=magnitude, interleaved=config.rope.interleaved,
    )  # fmt: skip


@partial(jax.jit, static_argnums=0)
def run(config, params, hidden, position, cache, mask):
    module = config.module(hidden.shape[2], "mixer", ON_THIS_DEVICE)
    return module.apply({"params": params}, hidden, position, position + 1, cache, mask)


commit = jax.jit(lambda cache, rows, count: cache.commit(rows, count))


def hidden_states(num_tokens, batch=BATCH, width=WIDTH, seed=1):
    return np.random.default_rng(seed).standard_normal((batch, num_tokens, width)).astype(np.float32)


def positions(first, num_tokens):
    return jnp.asarray(np.reshape(first, (-1, 1)) + np.arange(num_tokens), jnp.int32)


def filled_cache(config, params, hidden, dtype=jnp.float32, policy=KVCache, lengths=LENGTHS, capacity=CAPACITY):
    """A cache with the first tokens of each row, which are given longest first."""
    cache = config.empty_cache(len(hidden), capacity, dtype, policy)
    _, rows = run(config, params, hidden, positions(np.zeros(len(hidden)), hidden.shape[1]), None, Causal())
    return commit(cache, rows, jnp.asarray(lengths))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_is_the_formula(config):
    params, hidden = parameters(config), hidden_states(19, batch=2)
    got, _ = run(config, params, hidden, positions([0, 0], 19), None, Causal())
    for row in range(2):
        np.testing.assert_allclose(got[row], expected(config, params, hidden[row], np.arange(19)), atol=TOLERANCE)


@pytest.mark.parametrize("mask", [Causal(), Causal() & Window(4)], ids=["causal", "window"])
def test_both_forms_are_one(mask, monkeypatch):
    """With tokens that are not kept, too: those a row's queries never read."""
    config, params = PLAIN, parameters(PLAIN)
    before, new = hidden_states(LENGTHS.max()), hidden_states(7, seed=2)
    cache = filled_cache(config, params, before, policy=MarkedCache)
    kept = jnp.asarray(np.random.default_rng(3).random((BATCH, CAPACITY)) < 0.6) & cache.kept
    cache = dataclasses.replace(cache, kept=kept)
    position, got = positions(LENGTHS, 7), {}
    for form, most in (("absorbed", 13), ("expanded", 0)):
        monkeypatch.setattr(MLAConfig, "most_absorbed_tokens", most)
        run.clear_cache()  # which does not see the change
        got[form], _ = run(config, params, new, position, cache, mask)
    np.testing.assert_allclose(got["absorbed"], got["expanded"], atol=TOLERANCE)
    for row, length in enumerate(LENGTHS):
        for token in range(7):
            reads = np.concatenate([np.flatnonzero(kept[row, :length]), length + np.arange(token + 1)])
            reads = reads if isinstance(mask, Causal) else reads[reads > length + token - 4]
            row_hidden = np.concatenate([before[row, :length], new[row]])[reads]
            want = expected(config, params, row_hidden, reads)[-1]
            np.testing.assert_allclose(got["absorbed"][row, token], want, atol=TOLERANCE)


def test_a_loop_writes_the_cache_in_place():
    """Nothing as large as a cache is copied or made besides; the caches that come out are those that went in."""

    def loop(params, hidden, cache):
        def step(carry):
            hidden, cache = carry
            out, rows = run(PLAIN, params, hidden, cache.length[:, None], cache, Causal())
            return out, cache.commit(rows, jnp.isfinite(out[:, 0, 0]).astype(jnp.int32))

        return jax.lax.while_loop(lambda carry: jnp.min(carry[1].length) < 800, step, (hidden, cache))

    cache = jax.eval_shape(lambda: PLAIN.empty_cache(BATCH, 896, jnp.float32))
    hidden = jax.ShapeDtypeStruct((BATCH, 1, WIDTH), jnp.float32)
    compiled = jax.jit(loop, donate_argnums=2).lower(parameters(PLAIN), hidden, cache).compile()
    sizes = [cache.latent.size, cache.rope_key.size]
    copies = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose)\(", compiled.as_text())
    assert max((np.prod([int(size) for size in shape.split(",")]) for shape in copies), default=0) < sizes[1]
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * sum(sizes)
    assert compiled.memory_analysis().alias_size_in_bytes >= 4 * sum(sizes)


def test_the_bytes_of_a_cache_are_those_of_its_latents():
    """DeepSeek-V3 (its config.json): 61 layers of 512 + 64 numbers, 70,272 bytes per token in bfloat16."""
    mixer = MLAConfig(128, 128, 128, 512, 1536, Rope(64, 1e4, interleaved=True), 192**-0.5, NORM)
    tokens = 128
    for policy, per_token in ((KVCache, 70_272), (MarkedCache, 70_272 + 61)):
        caches = jax.eval_shape(lambda policy=policy: [mixer.empty_cache(1, tokens, jnp.bfloat16, policy)] * 61)
        buffers = jax.tree.leaves([(cache.latent, cache.rope_key, cache.kept) for cache in caches])
        assert sum(leaf.size * leaf.dtype.itemsize for leaf in buffers) == per_token * tokens
    assert mixer.most_absorbed_tokens == 128


def test_few_tokens_read_the_latents_themselves():
    """Always where a latent is no larger than the key and the value of one head, as making those saves nothing."""
    assert PLAIN.most_absorbed_tokens == 13  # 11 x 12 / (2 x 11 - 12)
    assert dataclasses.replace(PLAIN, latent_rank=6).most_absorbed_tokens == 128


def test_there_is_no_invariant_mode():
    block = pre_norm_block(PLAIN, GatedMLPConfig(17), NORM)
    with pytest.raises(ValueError, match="no invariant mode: latent attention"):
        Model(ModelConfig(19, WIDTH, CAPACITY, (block,), NORM, False), invariant=True)
