"""Computes block-sparse attention in NumPy float64, query by query; imports nothing from the project."""

import numpy as np


def attention(query, key, value, reads, query_block, key_block, scale, offset, length, softcap):
    """Output [B, T, N, I] and log-sum-exp [B, T, N].

    reads[b, j, i, c] says that query block i of the j-th run of heads reads key block c.
    """
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    batch, num_tokens, num_heads, _ = query.shape
    slots = np.arange(key.shape[2])
    output = np.zeros((batch, num_tokens, num_heads, value.shape[3]))
    lse = np.full((batch, num_tokens, num_heads), -np.inf)
    for b in range(batch):
        for n in range(num_heads):
            kv_head = n * key.shape[1] // num_heads
            head_reads = reads[b, n * reads.shape[1] // num_heads]
            for t in range(num_tokens):
                visible = (slots <= offset[b] + t) & (slots < length[b])
                read = np.flatnonzero(visible & head_reads[t // query_block, slots // key_block])
                if read.size == 0:
                    continue
                score = key[b, kv_head, read] @ query[b, t, n] * scale
                if softcap is not None:
                    score = softcap * np.tanh(score / softcap)
                weight = np.exp(score - score.max())
                output[b, t, n] = weight @ value[b, kv_head, read] / weight.sum()
                lse[b, t, n] = score.max() + np.log(weight.sum())
    return output, lse
