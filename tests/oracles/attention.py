"""Computes attention in NumPy float64 by definition, one query at a time: softmax over its readable keys."""

import numpy as np


def attention(query, keys, values, readable, scale, softcap=None):
    """query [N, H], keys [M, K, H], values [M, K, I], readable [M] or [M, K]: each head's mixture of values, [N, I]."""
    num_heads, group = query.shape[0], query.shape[0] // keys.shape[1]
    output = np.zeros((num_heads, values.shape[2]), np.float64)
    for head in range(num_heads):
        may_read = readable if readable.ndim == 1 else readable[:, head // group]
        scores = scale * keys[may_read, head // group].astype(np.float64) @ query[head].astype(np.float64)
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        output[head] = weights / weights.sum() @ values[may_read, head // group].astype(np.float64)
    return output
