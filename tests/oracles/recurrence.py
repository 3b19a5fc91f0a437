"""Computes linear attention with decay and the gated delta rule by definition, token by token in float64."""

import numpy as np


def recurrence(query, key, value, log_decay, state, *, scale, beta=None):
    """One row: query, key [T, N, H]; value [T, N, I]; log_decay [T, N, H or 1]; state [N, H, I]; beta [T, N].

    Gives the outputs [T, N, I], what each token added to the state under its key [T, N, I], and the last state. With
    `beta` a token first removes its share of what the state holds under its key (the gated delta rule).
    """
    query, key, value, log_decay = (np.asarray(x, np.float64) for x in (query, key, value, log_decay))
    state, outputs, added = np.array(state, np.float64), np.zeros(value.shape), np.array(value)
    for token in range(len(query)):
        for head in range(query.shape[1]):
            decay = np.exp(log_decay[token, head])
            state[head] = np.broadcast_to(decay, key.shape[2:])[:, None] * state[head]
            if beta is not None:
                held = key[token, head] @ state[head]
                added[token, head] = beta[token, head] * (value[token, head] - held)
            state[head] += np.outer(key[token, head], added[token, head])
            outputs[token, head] = scale * query[token, head] @ state[head]
    return outputs, added, state


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)
