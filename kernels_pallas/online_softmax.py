"""Computes the online softmax over blocks of keys, the inner body of every attention kernel.

For each query the maximum score m, the sum of weights and the weighted values are kept; a new block rescales the
earlier sums by 2^(m_old - m_new). Scores are in units of log 2 (multiplied by `scale * LOG2E`), as hardware has the
power of two. FlashAttention-2, arXiv 2307.08691. A masked score is finite, so that no difference is NaN; a query whose
keys were all masked is recognised by its maximum, gives 0 and has a log-sum-exp of -inf.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from decodax.kernels_pallas.compat import Warpgroup

LOG2E = math.log2(math.e)
MASKED = -1e30
_EMPTY = -1e29  # a maximum below this: every key was masked


def capped(score: jax.Array, scale: float, softcap: float | None) -> jax.Array:
    """Products of queries and keys as scores in units of log 2."""
    if softcap is None:
        return score * (scale * LOG2E)
    return jnp.tanh(score * (scale / softcap)) * (softcap * LOG2E)


class OnlineSoftmax(NamedTuple):
    """The state for M queries, all float32.

    maximum: the largest score, [M, 1] on TPU and [M] on GPU.
    total: the sum of weights, of the same shape.
    output: the sum of weighted values, [M, I].
    """

    maximum: jax.Array
    total: jax.Array
    output: jax.Array


def empty_softmax(num_queries: int, value_size: int) -> OnlineSoftmax:
    """On TPU: the state before any key."""
    column = jnp.zeros((num_queries, 1), jnp.float32)
    return OnlineSoftmax(column + MASKED, column, jnp.zeros((num_queries, value_size), jnp.float32))


def absorb(seen: OnlineSoftmax, score: jax.Array, value: jax.Array) -> OnlineSoftmax:
    """On TPU: `seen` plus a block of keys, with scores [M, S] (MASKED if not attended to) and values [S, I]."""
    maximum = jnp.maximum(seen.maximum, jnp.max(score, axis=1, keepdims=True))
    weight = jnp.exp2(score - maximum)
    decay = jnp.exp2(seen.maximum - maximum)
    total = seen.total * decay + jnp.sum(weight, axis=1, keepdims=True)
    mixed = jax.lax.dot(
        weight.astype(value.dtype), value, precision=precision(value.dtype), preferred_element_type=jnp.float32
    )
    return OnlineSoftmax(maximum, total, seen.output * decay + mixed)


def finish(seen: OnlineSoftmax) -> tuple[jax.Array, jax.Array]:
    """On TPU: the output [M, I] and the log-sum-exp [M, 1] (natural logarithm)."""
    empty = seen.maximum < _EMPTY
    total = jnp.where(empty, 1.0, seen.total)
    output = jnp.where(empty, 0.0, seen.output / total)
    return output, jnp.where(empty, -jnp.inf, (seen.maximum + jnp.log2(total)) / LOG2E)


def precision(dtype: Any) -> jax.lax.Precision:
    """The precision of products on TPU: float32 operands in full, narrower ones as they are."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def empty_softmax_gpu(warpgroup: Warpgroup, num_queries: int, value_size: int) -> OnlineSoftmax:
    """On GPU: the state before any key, in the layout of accumulators."""
    output = warpgroup.full((num_queries, value_size), 0.0)
    column = warpgroup.column(num_queries)
    return OnlineSoftmax(column + MASKED, column, output)


def absorb_gpu(warpgroup: Warpgroup, seen: OnlineSoftmax, score: jax.Array, value: Any, dtype: Any) -> OnlineSoftmax:
    """On GPU: `seen` plus a block of keys.

    seen: the state.
    score: [M, S] in registers.
    value: [S, I] in shared memory.
    dtype: to which weights are rounded.
    """
    maximum = jnp.maximum(seen.maximum, jnp.max(score, axis=1))
    weight = jnp.exp2(score - warpgroup.rows(maximum, score.shape))
    decay = jnp.exp2(seen.maximum - maximum)
    total = seen.total * decay + jnp.sum(weight, axis=1)
    output = seen.output * warpgroup.rows(decay, seen.output.shape)
    return OnlineSoftmax(maximum, total, warpgroup.dot_add(output, weight.astype(dtype), value))


def finish_gpu(warpgroup: Warpgroup, seen: OnlineSoftmax) -> tuple[jax.Array, jax.Array]:
    """On GPU: the output [M, I] and the log-sum-exp [M] (natural logarithm)."""
    empty = seen.maximum < _EMPTY
    total = jnp.where(empty, 1.0, seen.total)
    factor = jnp.where(empty, 0.0, 1.0 / total)
    lse = jnp.where(empty, -jnp.inf, (seen.maximum + jnp.log(total) * LOG2E) * (1 / LOG2E))
    return seen.output * warpgroup.rows(factor, seen.output.shape), lse
