"""Attention in NumPy float64, one query at a time, by the definition: the keys it may read, softmax over those, mix."""

import numpy as np


def attention(query, keys, values, readable, scale, softcap=None):
    """query [N, H]; keys and values [M, K, H]; readable [M] or [M, K]: the mixture of values per head, [N, H]."""
    num_heads, group = query.shape[0], query.shape[0] // keys.shape[1]
    output = np.zeros(query.shape, np.float64)
    for head in range(num_heads):
        may_read = readable if readable.ndim == 1 else readable[:, head // group]
        scores = scale * keys[may_read, head // group].astype(np.float64) @ query[head].astype(np.float64)
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        output[head] = weights / weights.sum() @ values[may_read, head // group].astype(np.float64)
    return output
