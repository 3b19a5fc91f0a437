"""Learned sinks equal a float64 softmax with one more score: in plain JAX, in kernels, and in gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.attention.attend import attend
from decodax.layers.attention.mask import Causal, Window
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.full import KVCache

BATCH, NEW, HEADS, KV_HEADS, SIZE, CAPACITY = 2, 3, 6, 2, 16, 128
LENGTHS = np.array([7, 0])
TOLERANCE = 1e-5  # float32, sums of at most 16 terms of size 1
SINK = np.array([-30.0, -1.0, 0.0, 0.5, 2.0, 30.0], np.float32)


def expected(query, key, value, cached_key, cached_value, window):
    """Output and log-sum-exp, row by row and head by head."""
    output, lse = np.zeros(query.shape), np.zeros(query.shape[:3])
    for row, token, head in np.ndindex(BATCH, NEW, HEADS):
        group, length = head // (HEADS // KV_HEADS), LENGTHS[row]
        first = max(length + token - window + 1, 0)
        keys = np.concatenate([cached_key[row, group, :length], key[row, group, : token + 1]])[first:]
        values = np.concatenate([cached_value[row, group, :length], value[row, group, : token + 1]])[first:]
        weight = np.exp(np.append(keys @ query[row, token, head] * 0.3, SINK[head]).astype(np.float64))
        output[row, token, head] = (weight[:-1] / weight.sum()) @ values
        lse[row, token, head] = np.log(weight.sum())
    return output, lse


@pytest.mark.parametrize("implementation", ["xla", "tpu_interpreted"])
def test_a_sink_is_one_more_score(implementation):
    random = np.random.default_rng(0)
    query = random.normal(size=(BATCH, NEW, HEADS, SIZE)).astype(np.float32)
    key, value = random.normal(size=(2, BATCH, KV_HEADS, NEW, SIZE)).astype(np.float32)
    cached = random.normal(size=(2, BATCH, KV_HEADS, CAPACITY, SIZE)).astype(np.float32)
    cache = KVCache(*map(jnp.asarray, cached), jnp.asarray(LENGTHS, jnp.int32))
    position = jnp.asarray(LENGTHS[:, None] + np.arange(NEW), jnp.int32)

    def run(query, key, value, sink):
        mask, execution = Causal() & Window(5), Execution(implementation)
        return attend(query, key, value, position, mask, cache, scale=0.3, softcap=None, sink=sink, execution=execution)

    arrays = tuple(map(jnp.asarray, (query, key, value, SINK)))
    for got, want in zip(jax.jit(run)(*arrays), expected(query, key, value, *cached, window=5), strict=True):
        np.testing.assert_allclose(got, want, atol=TOLERANCE)
