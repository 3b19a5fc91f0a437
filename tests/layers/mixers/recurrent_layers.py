"""Checks that a layer with a recurrent state is its recurrence, by an oracle of the layer.

An oracle maps (weights, hidden [T, D] of one row from its first token on) to the layer's outputs [T, D], in float64.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from decodax.core.weight import Weight
from decodax.layers.attention.mask import Causal
from decodax.layers.execution import ON_THIS_DEVICE

WIDTH = 13
TOLERANCE = 2e-5  # float32, sums over some hundred terms of size 1


class Layer:
    """A mixer with random weights, and its oracle."""

    def __init__(self, config, oracle, seed=0):
        self.config, self.oracle = config, oracle
        self.module = config.module(WIDTH, "mixer", ON_THIS_DEVICE)
        random = np.random.default_rng(seed)

        def value(weight):
            size = 1 if len(weight.shape) == 1 else weight.shape[1] ** -0.5
            return jnp.asarray((weight.init == "ones") + size * random.standard_normal(weight.shape), jnp.float32)

        self.params = jax.tree.map(value, config.weights(WIDTH), is_leaf=lambda leaf: isinstance(leaf, Weight))
        self.weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), self.params)
        self.run = jax.jit(self.forward)

    def forward(self, hidden, position, cache, mask):
        return self.module.apply({"params": self.params}, hidden, position, position + 1, cache, mask)

    def want(self, hidden):
        return np.stack([self.oracle(self.weights, row) for row in np.asarray(hidden, np.float64)])

    def empty(self, batch):
        return self.config.empty_cache(batch, 0, jnp.float32)


commit = jax.jit(lambda cache, *accepted: cache.commit(*accepted))


def hidden_states(num_tokens, batch):
    return np.random.default_rng(1).standard_normal((batch, num_tokens, WIDTH)).astype(np.float32)


def close(got, want, tolerance=TOLERANCE):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.nanmax(np.abs(want), initial=0)))


def in_forwards(layer, hidden, sizes):
    """A chain of tokens in forwards of these sizes, each committed: all outputs, and the cache in the end."""
    cache, outputs, start = layer.empty(len(hidden)), [], 0
    for size in sizes:
        position = np.broadcast_to(start + np.arange(size, dtype=np.int32), (len(hidden), size))
        output, update = layer.run(hidden[:, start : start + size], position, cache, Causal())
        cache = commit(cache, update, np.full(len(hidden), size, np.int32))
        outputs.append(output)
        start += size
    return np.concatenate(outputs, axis=1), cache


def check_chunks(layer):
    """More tokens than a block of the recurrence, at once and with a state between them, which keeps its size."""
    hidden = hidden_states(101, batch=2)
    want = layer.want(hidden)
    for sizes in ((101,), (64, 37)):
        got, cache = in_forwards(layer, hidden, sizes)
        close(got, want)
        assert cache.state.shape == layer.empty(2).state.shape and cache.state.dtype == jnp.float32
        np.testing.assert_array_equal(cache.length, 101)


def check_long(layer, tolerance):
    """10,000 steps: the state stays finite and the outputs those of float64."""
    num_tokens = 10_000
    hidden = hidden_states(num_tokens, batch=1)

    @partial(jax.jit, static_argnums=1)
    def decode(hidden, num_tokens):
        def step(cache, inputs):
            output, update = layer.forward(inputs[:, None], cache.length[:, None], cache, Causal())
            return cache.commit(update, jnp.ones_like(cache.length)), output[:, 0]

        return jax.lax.scan(step, layer.empty(1), jnp.swapaxes(hidden, 0, 1), length=num_tokens)

    cache, got = decode(jnp.asarray(hidden), num_tokens)
    assert np.isfinite(cache.state).all()
    close(got[:, 0], layer.want(hidden)[0], tolerance)
