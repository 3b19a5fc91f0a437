"""Computes compressed convolutional attention in NumPy float64, token by token, as transformers' zaya does.

Weights by their names in a checkpoint, convolutions as torch keeps them: [channels, inputs of the group, taps].
"""

import numpy as np

from tests.oracles.attention import attention
from tests.oracles.latent_attention import rotated


def convolution(inputs, weight, bias):
    """Causal, over [M, channels] with the padding first: M - taps + 1 outputs."""
    channels, group_inputs, taps = weight.shape
    outputs = np.zeros((len(inputs) - taps + 1, channels))
    for channel in range(channels):
        first = channel // group_inputs * group_inputs
        for start in range(len(outputs)):
            read = inputs[start : start + taps, first : first + group_inputs]
            outputs[start, channel] = np.sum(read.T * weight[channel]) + bias[channel]
    return outputs


def convolutional_attention(weights, hidden, sizes, *, scale, inverse_frequency):
    """The layer's output for every token of one row, hidden [M, D]; sizes: query heads, key-value heads, head size."""
    num_heads, num_kv_heads, size = sizes
    weights = {name: np.asarray(weight, np.float64) for name, weight in weights.items()}
    hidden, num_tokens = np.asarray(hidden, np.float64), len(hidden)
    group, taps = (
        num_heads // num_kv_heads,
        [weights[f"conv_qk_{kind}.weight"].shape[2] for kind in ("depthwise", "grouped")],
    )

    def project(name, inputs):
        return inputs @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    queries, keys = project("q_proj", hidden), project("k_proj", hidden)
    packed = np.concatenate([queries, keys], axis=1)
    convolved = np.concatenate([np.zeros((sum(taps) - 2, packed.shape[1])), packed])
    for kind in ("depthwise", "grouped"):
        convolved = convolution(convolved, weights[f"conv_qk_{kind}.weight"], weights[f"conv_qk_{kind}.bias"])
    convolved = convolved.reshape(num_tokens, -1, size)
    queries, keys = queries.reshape(num_tokens, -1, size), keys.reshape(num_tokens, -1, size)

    new_queries, new_keys = np.zeros_like(queries), np.zeros_like(keys)
    for head in range(num_heads):
        new_queries[:, head] = convolved[:, head] + (queries[:, head] + keys[:, head // group]) / 2
    for head in range(num_kv_heads):
        mean_query = queries[:, head * group : (head + 1) * group].mean(axis=1)
        new_keys[:, head] = convolved[:, num_heads + head] + (mean_query + keys[:, head]) / 2
    new_queries *= np.sqrt(size) / np.linalg.norm(new_queries, axis=2, keepdims=True)
    new_keys *= np.sqrt(size) / np.linalg.norm(new_keys, axis=2, keepdims=True) * weights["temp"][:, None]

    before = np.concatenate([np.zeros_like(hidden[:1]), hidden[:-1]])
    values = np.concatenate([project("v_proj_current", hidden), project("v_proj_delayed", before)], axis=1)
    values = values.reshape(num_tokens, num_kv_heads, size)
    turned, position = 2 * len(inverse_frequency), np.arange(num_tokens)
    new_queries, new_keys = (
        np.concatenate(
            [rotated(heads[..., :turned], position, inverse_frequency, 1.0, False), heads[..., turned:]], axis=2
        )
        for heads in (new_queries, new_keys)
    )
    mixed = [attention(query, new_keys, values, position <= token, scale) for token, query in enumerate(new_queries)]
    return project("o_proj", np.reshape(mixed, (num_tokens, -1)))
