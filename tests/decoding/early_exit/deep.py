"""A model with layers to skip, its prompts and drafts, and a slow forward over texts in which tokens skip layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from decodax import decoding
from decodax.models.model import Model
from tests.speculation import LENGTHS, NEW, NO_STOPS, PROMPTS, padded
from tests.tiny import tiny_config

DEEP = Model(dataclasses.replace(tiny_config(), blocks=tiny_config().blocks * 2))
L, WIDTH = DEEP.config.num_layers, DEEP.config.hidden_size


def random_params():
    params = DEEP.init(jax.random.key(0))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


PARAMS = random_params()


def start(layer_policy, params=PARAMS, rows=slice(None)):
    """The state of some of the three prompts, greedy, prefilled with a layer policy."""
    index = np.arange(3)[rows]
    return decoding.prefill(
        DEEP, params, PROMPTS[rows], LENGTHS[rows], NEW[rows], index, stop_token_ids=NO_STOPS, layer_policy=layer_policy
    )


@jax.jit
def _read(params, tokens, active, garbage):
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, inputs = DEEP.embed(params, tokens, tokens * 0), []
    for index in range(L):
        inputs.append(hidden)
        runs = active[:, :, index, None]
        given = jnp.where(runs, hidden, garbage)
        hidden = jnp.where(runs, DEEP.apply(params, given, position, layers=(index, index + 1)).hidden, hidden)
    return jnp.argmax(DEEP.logits(params, hidden), axis=-1), jnp.stack(inputs, axis=2)


def read(params, rows, layers_of):
    """Whole texts without a cache: the most probable token after each of their tokens, and each layer's inputs.

    layers_of(b, i): the layers that token i of row b runs. In a layer that it does not run, the token is
    noise: a correct result did not attend to it.
    """
    tokens = padded(rows)
    active = np.zeros((*tokens.shape, L), bool)
    for row, text in enumerate(rows):
        for place in range(len(text)):
            active[row, place, list(layers_of(row, place))] = True
    garbage = 10 * jax.random.normal(jax.random.key(5), (*tokens.shape, WIDTH))
    most_probable, inputs = _read(params, tokens, active, garbage)
    return np.asarray(most_probable), np.asarray(inputs)


def assert_follows(params, rows, layers_of):
    """Each new token of the texts is the most probable one, every token before it having run its own layers."""
    most_probable, _ = read(params, rows, layers_of)
    for row, text in enumerate(rows):
        np.testing.assert_array_equal(text[LENGTHS[row] :], most_probable[row, LENGTHS[row] - 1 : len(text) - 1])
