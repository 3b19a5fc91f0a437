"""Computes prefill attention by definition: NumPy float64, one query at a time; imports nothing from the project."""

import math

import numpy as np


def is_read(key, at, *, length, causal, window, num_sink_tokens):
    """Whether a query at index `at` among the keys attends to this key."""
    if key >= length or (causal and key > at):
        return False
    return window is None or at - key < window or key < num_sink_tokens


def prefill(
    query,
    key,
    value,
    *,
    scale,
    causal,
    offset=None,
    length=None,
    window=None,
    num_sink_tokens=0,
    softcap=None,
    sink_logits=None,
    query_segments=None,
    key_segments=None,
):
    """Output [B, T, N, I] and log-sum-exp [B, T, N]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, num_queries, num_heads, _ = query.shape
    group, num_keys = num_heads // key.shape[1], key.shape[2]
    sinks = np.broadcast_to(num_sink_tokens, batch)
    output = np.zeros((batch, num_queries, num_heads, value.shape[3]))
    lse = np.full((batch, num_queries, num_heads), -np.inf)
    for row in range(batch):
        row_length = num_keys if length is None else int(length[row])
        for token in range(num_queries):
            at = token + (0 if offset is None else int(offset[row]))
            rule = {"length": row_length, "causal": causal, "window": window, "num_sink_tokens": sinks[row]}
            chosen = [i for i in range(num_keys) if is_read(i, at, **rule)]
            if query_segments is not None:
                chosen = [i for i in chosen if key_segments[row, i] == query_segments[row, token]]
            for head in range(num_heads):
                scores = scale * (key[row, head // group, chosen] @ query[row, token, head])
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                everything = list(scores) + ([] if sink_logits is None else [float(sink_logits[head])])
                if everything:
                    largest = max(everything)
                    total = sum(math.exp(score - largest) for score in everything)
                    lse[row, token, head] = largest + math.log(total)
                    weights = np.exp(scores - lse[row, token, head])
                    output[row, token, head] = weights @ value[row, head // group, chosen]
    return output, lse
