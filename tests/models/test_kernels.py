"""A model in kernels equals the model without them: a prompt in chunks, tokens, drafts, trees, and the loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import decoding
from decodax.layers.attention.mask import Ancestors
from decodax.layers.execution import Execution
from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.mixers.lightning import LightningConfig
from decodax.layers.mixers.mla import MLAConfig
from decodax.layers.moe.layer import MoEConfig
from decodax.layers.moe.routers.top_k import TopK
from decodax.layers.norm import RMSNormConfig
from decodax.layers.rope import Rope
from decodax.models.config import BlockConfig, ModelConfig, pre_norm_block
from decodax.models.model import Model, Params, commit

HEAD, WIDTH, VOCABULARY = 128, 48, 61
TOLERANCE = 1e-5  # of the largest logit


def block(**options) -> BlockConfig:
    mixer = GQAConfig(4, 2, HEAD, Rope(HEAD, 10000.0), scale=HEAD**-0.5, **options)
    return pre_norm_block(mixer, GatedMLPConfig(40), RMSNormConfig(1e-5))


# One full layer, one with a window and capped scores.
BLOCKS = (block(), block(window=75, softcap=5.0))
PLAIN = Model(ModelConfig(VOCABULARY, WIDTH, 512, BLOCKS, RMSNormConfig(1e-5), True))
PARAMS = PLAIN.init(jax.random.key(0))
# Latent attention and experts, then a recurrent layer.
NORM = RMSNormConfig(1e-5)
LATENT = MLAConfig(2, 16, 16, 128, None, Rope(64, 1e4, interleaved=True), 80**-0.5, NORM)
EXPERTS = MoEConfig(TopK(4, 2, "softmax", renormalise=True), 128)
STATE = LightningConfig(2, 64, (0.1, 0.5), "silu", 0.1, NORM)
OTHERS = (pre_norm_block(LATENT, EXPERTS, NORM), pre_norm_block(STATE, GatedMLPConfig(40), NORM))
MIXED = Model(ModelConfig(VOCABULARY, 128, 512, OTHERS, NORM, True))
MIXED_PARAMS = MIXED.init(jax.random.key(0))


def in_kernels(implementation: str, model: Model = PLAIN) -> Model:
    return dataclasses.replace(model, execution=Execution(implementation))


def forwards(model: Model, params: Params = PARAMS) -> list[np.ndarray]:
    """Logits of two chunks of a prompt, a token, and a tree after it; the second row ends with the first chunk."""

    @jax.jit
    def forward(tokens, caches, position, mask):
        out = model.apply(params, tokens, position, caches, mask=mask)
        return model.logits(params, out.hidden), out.cache_updates

    tokens = jax.random.randint(jax.random.key(1), (2, 160), 0, VOCABULARY)
    caches, found, length = model.empty_cache(2, 256, jnp.float32), [], np.zeros(2, np.int32)
    tree = Ancestors.from_parents(jnp.array([[-1, 0, 0, 2, 1]]))
    depth = np.array([0, 1, 1, 2, 2])
    for num_tokens, count, mask in ((70, (70, 70), None), (66, (66, 0), None), (1, (1, 1), None), (5, (0, 0), tree)):
        offset = depth if mask is tree else np.arange(num_tokens)
        position = jnp.asarray(length[:, None] + offset, jnp.int32)
        logits, updates = forward(tokens[:, :num_tokens], caches, position, mask)
        found.append(np.asarray(logits))
        caches = commit(caches, updates, jnp.array(count, jnp.int32))
        length = length + np.array(count, np.int32)
        tokens = tokens[:, num_tokens:]
    return found


@pytest.mark.parametrize("implementation", ["tpu_interpreted", "gpu_interpreted"])
@pytest.mark.slow
def test_logits_are_those_without_kernels(implementation):
    for got, want in zip(forwards(in_kernels(implementation)), forwards(PLAIN), strict=True):
        np.testing.assert_allclose(got, want, atol=TOLERANCE * np.abs(want).max())


@pytest.mark.slow
def test_latents_experts_and_states_are_those_without_kernels():
    want, got = (forwards(model, MIXED_PARAMS) for model in (MIXED, in_kernels("tpu_interpreted", MIXED)))
    for with_kernels, without in zip(got, want, strict=True):
        np.testing.assert_allclose(with_kernels, without, atol=TOLERANCE * np.abs(without).max())


@pytest.mark.slow
def test_the_loop_writes_the_same_tokens():
    """`prefill` runs the prompts in a chunk and the loop steps through the rest; buffers have room for full tiles."""
    prompts = np.random.default_rng(2).integers(0, VOCABULARY, (2, 80)).astype(np.int32)
    lengths, seeds = np.array([80, 71]), np.zeros(2, np.uint32)
    tokens = []
    for model in (PLAIN, in_kernels("tpu_interpreted")):
        state = decoding.prefill(model, PARAMS, prompts, lengths, 6, seeds)
        state = jax.jit(decoding.autoregressive(model), donate_argnums=1)(PARAMS, state)
        tokens.append(np.asarray(state.tokens)[:, :86])
    assert state.caches[0].capacity % 128 == 0
    np.testing.assert_array_equal(*tokens)
