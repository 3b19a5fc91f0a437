"""What is around the layers equals its definition in float64: embeddings with all options, a head with all options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.core.weight import Weight
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.norm import LayerNormConfig
from decodax.models.config import BlockConfig, ModelConfig, SubLayer
from decodax.models.embedding import EmbeddingConfig, LearnedPositions
from decodax.models.head import HeadConfig
from decodax.models.model import Model

VOCABULARY, WIDTH, INNER, OUTER = 13, 7, 5, 3
TOLERANCE = 1e-5  # float32, sums of at most 7 terms of size 1
NORM = LayerNormConfig(1e-5)
POSITIONS = LearnedPositions(11, offset=2)
TOKENS, POSITION = np.array([[3, 12, 0], [7, 7, 1]]), np.array([[0, 1, 8], [4, 2, 3]])


def model_of(embedding, head, *, tied):
    block = BlockConfig(SubLayer(GQAConfig(1, 1, 2, None, 1.0), NORM), None)
    return Model(ModelConfig(VOCABULARY, WIDTH, 64, (block,), NORM, tied, embedding, head))


def params_of(model):
    random = np.random.default_rng(0)
    draw = lambda weight: (weight.init == "ones") + random.standard_normal(weight.shape)
    exact = jax.tree.map(draw, model.config.weights(), is_leaf=lambda leaf: isinstance(leaf, Weight))
    return exact, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), exact)


@pytest.mark.parametrize("size", [None, INNER])
@pytest.mark.parametrize("norm", [None, NORM])
@pytest.mark.parametrize("positions", [None, POSITIONS])
def test_embeddings(size, norm, positions):
    model = model_of(EmbeddingConfig(1.7, size, positions, norm), HeadConfig(), tied=False)
    exact, params = params_of(model)
    want = 1.7 * exact["embedding"][TOKENS]
    if size is not None:
        want = want @ exact["embedding_projection"].T
    if positions is not None:
        want = want + exact["position_embedding"][POSITION + 2]
    if norm is not None:
        centred = want - want.mean(axis=-1, keepdims=True)
        scale = exact["embedding_norm"]["weight"] / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
        want = centred * scale + exact["embedding_norm"]["bias"]
    got = jax.jit(model.embed)(params, jnp.asarray(TOKENS, jnp.int32), jnp.asarray(POSITION, jnp.int32))
    np.testing.assert_allclose(got, want, atol=TOLERANCE * np.abs(want).max())


@pytest.mark.parametrize(("tied", "size"), [(False, None), (False, OUTER), (True, None), (True, INNER)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_logits_of_all_tokens_and_of_some(tied, size, bias, softcap):
    head = HeadConfig(0.6, softcap, bias, size)
    model = model_of(EmbeddingConfig(size=size if tied else None), head, tied=tied)
    exact, params = params_of(model)
    normed = np.random.default_rng(1).standard_normal((2, 3, WIDTH))
    inputs = normed if size is None else normed @ exact["head_projection"].T
    want = inputs @ exact["embedding" if tied else "head"].T + (exact["head_bias"] if bias else 0.0)
    want = 0.6 * want
    want = want if softcap is None else softcap * np.tanh(want / softcap)
    states, limit = jnp.asarray(normed, jnp.float32), TOLERANCE * np.abs(want).max()
    np.testing.assert_allclose(jax.jit(model.read_out)(params, states), want, atol=limit)
    some = np.array([[[1, 12], [0, 0], [5, 3]], [[2, 2], [9, 4], [11, 10]]])
    got = jax.jit(model.token_logits)(params, states, jnp.asarray(some, jnp.int32))
    np.testing.assert_allclose(got, np.take_along_axis(want, some, axis=2), atol=limit)


def test_a_block_may_be_a_mixer_alone():
    """Whose result is added to its input; there are no weights of a feed-forward layer."""
    model = model_of(EmbeddingConfig(), HeadConfig(), tied=True)
    exact, params = params_of(model)
    assert {*exact["blocks_0"]} == {"mixer", "mixer_norm"}
    tokens, position = jnp.asarray(TOKENS[:1, :1], jnp.int32), jnp.zeros((1, 1), jnp.int32)
    out = jax.jit(model.apply)(params, tokens, position)
    inputs = exact["embedding"][TOKENS[:1, :1]]
    centred = inputs - inputs.mean(axis=-1, keepdims=True)
    norm, mixer = exact["blocks_0"]["mixer_norm"], exact["blocks_0"]["mixer"]
    normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * norm["weight"] + norm["bias"]
    want = inputs + normed @ mixer["value"].T @ mixer["out"].T  # a token alone attends to itself
    np.testing.assert_allclose(out.hidden, want, atol=TOLERANCE * np.abs(want).max())
    assert out.routes == (None,)


def test_orders_that_do_not_fit_are_refused():
    mixer, feed_forward = (SubLayer(GQAConfig(1, 1, 2, None, 1.0), NORM) for _ in range(2))
    with pytest.raises(ValueError, match="must have a feed-forward layer"):
        BlockConfig(mixer, None, "parallel")
    with pytest.raises(ValueError, match="no norm of the feed-forward layer's own"):
        BlockConfig(mixer, feed_forward, "parallel, one norm")
