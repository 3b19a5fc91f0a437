"""The MTP head under dynamic rope scaling: by default a token's row ends with the token itself.

The other tests of the head are in tests/decoding/drafters/test_mtp_head.py.
"""

import jax
import jax.numpy as jnp
import numpy as np

from decodax.layers.execution import ON_THIS_DEVICE
from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.norm import RMSNormConfig
from decodax.layers.rope import DynamicScaling, Rope
from decodax.models.config import pre_norm_block
from decodax.models.mtp_head import MTPHeadModel

BATCH, TOKENS, SIZE, KV_HEADS, HEAD_SIZE = 2, 11, 23, 3, 8
BASE, FACTOR, ORIGINAL, EPSILON = 100.0, 3.0, 5, 1e-5
TOLERANCE = 1e-5  # keys of about 1, from float32 sums of 46 products
NORM = RMSNormConfig(EPSILON)
ROPE = Rope(HEAD_SIZE, BASE, DynamicScaling(FACTOR, ORIGINAL))
BLOCK = pre_norm_block(GQAConfig(6, KV_HEADS, HEAD_SIZE, ROPE, scale=0.4), GatedMLPConfig(29), NORM)


def normed(vectors, weight):
    return vectors / np.sqrt(np.mean(vectors**2, axis=-1, keepdims=True) + EPSILON) * weight


def keys(params, embedded, hidden, row_length):
    """The head's keys [B, T, K, H] by definition, token i rotated as in a row of `row_length[i]` tokens."""
    halves = [normed(embedded, params["embedding_norm"]["weight"]), normed(hidden, params["hidden_norm"]["weight"])]
    block = params["block"]
    inputs = normed(np.concatenate(halves, axis=2) @ params["join"].T, block["mixer_norm"]["weight"])
    key = (inputs @ block["mixer"]["key"].T).reshape(BATCH, TOKENS, KV_HEADS, HEAD_SIZE)
    half, rotated = HEAD_SIZE // 2, np.zeros_like(key)
    for token, length in enumerate(row_length):
        growth = FACTOR * length / ORIGINAL - (FACTOR - 1) if length > ORIGINAL else 1.0
        base = BASE * growth ** (HEAD_SIZE / (HEAD_SIZE - 2))
        for pair in range(half):
            turned = np.exp(1j * token * base ** (-2 * pair / HEAD_SIZE))
            number = turned * (key[:, token, :, pair] + 1j * key[:, token, :, pair + half])
            rotated[:, token, :, pair], rotated[:, token, :, pair + half] = number.real, number.imag
    return rotated


def test_a_token_s_row_ends_with_it():
    head = MTPHeadModel(BLOCK, NORM, SIZE, ON_THIS_DEVICE)
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda weight: 0.3 * draw.standard_normal(weight.shape), head.weights())
    embedded, hidden = draw.standard_normal((2, BATCH, TOKENS, SIZE))
    position = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), (BATCH, TOKENS))

    @jax.jit
    def key_of(row_length):
        single = jax.tree.map(jnp.float32, (params, embedded, hidden))
        return jnp.swapaxes(head.apply(*single, position, row_length=row_length)[1].key, 1, 2)

    whole_row = jnp.full((BATCH, 1), TOKENS, jnp.int32)
    for row_length, wanted in ((None, 1 + np.arange(TOKENS)), (whole_row, np.full(TOKENS, TOKENS))):
        np.testing.assert_allclose(key_of(row_length), keys(params, embedded, hidden, wanted), rtol=0, atol=TOLERANCE)
