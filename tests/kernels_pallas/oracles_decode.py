"""Computes decode attention in NumPy float64 and plain loops: softmax over a list of keys for each query."""

import numpy as np


def attend(query, keys, values, *, scale, softcap, sink_logit):
    """One query [H], the keys [M, H] and values [M, I] that it attends to: output [I] and log-sum-exp."""
    scores = scale * keys @ query
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    logits = scores if sink_logit is None else np.append(scores, sink_logit)
    if logits.size == 0:
        return np.zeros(values.shape[1]), -np.inf
    weights = np.exp(logits - logits.max())
    log_sum_exp = logits.max() + np.log(weights.sum())
    return (weights / weights.sum())[: len(scores)] @ values, log_sum_exp


def decode(query, cached, new, *, scale, softcap=None, sink_logits=None):
    """query [B, T, N, H]; cached(b, t, n): cached keys and values that query t of row b and head n attends to.

    new: keys and values [B, K, U, ...] and allowed [B, T, U], or None.
    """
    query = np.asarray(query, np.float64)
    batch, num_queries, num_heads, _ = query.shape
    outputs, log_sum_exps = [], np.zeros((batch, num_queries, num_heads))
    for b in range(batch):
        for t in range(num_queries):
            for n in range(num_heads):
                keys, values = (np.asarray(x, np.float64) for x in cached(b, t, n))
                if new is not None:
                    chosen = np.flatnonzero(np.asarray(new.allowed)[b, t])
                    k = n * new.key.shape[1] // num_heads
                    keys = np.concatenate([keys, np.asarray(new.key, np.float64)[b, k, chosen]])
                    values = np.concatenate([values, np.asarray(new.value, np.float64)[b, k, chosen]])
                sink = None if sink_logits is None else float(sink_logits[n])
                output, log_sum_exps[b, t, n] = attend(
                    query[b, t, n], keys, values, scale=scale, softcap=softcap, sink_logit=sink
                )
                outputs.append(output)
    return np.reshape(outputs, (batch, num_queries, num_heads, -1)), log_sum_exps


def visible(length, first, num_sink_tokens):
    """The slots below `length` that are at `first` or later, or among the sinks."""
    return [slot for slot in range(length) if slot >= first or slot < num_sink_tokens]
