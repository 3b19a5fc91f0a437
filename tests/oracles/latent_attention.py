"""Computes latent attention in NumPy float64 for one row, as transformers' deepseek_v3 does.

Weights by their names in a checkpoint, [outputs, inputs]; keys and values of a head are adjacent in `kv_b_proj`.
"""

import numpy as np

from tests.oracles.attention import attention


def rms_norm(vectors, weight, eps):
    return vectors / np.sqrt(np.mean(vectors**2, axis=-1, keepdims=True) + eps) * weight


def rotated(vectors, position, inverse_frequency, magnitude, interleaved):
    """[M, ..., H] turned pair by pair; neighbours are pairs if `interleaved`, else coordinates half a head apart."""
    half = len(inverse_frequency)
    angle = np.asarray(position, np.float64)[:, None] * inverse_frequency
    turn = magnitude * np.exp(1j * angle).reshape(len(position), *(1,) * (vectors.ndim - 2), half)
    first, second = (
        (vectors[..., ::2], vectors[..., 1::2]) if interleaved else (vectors[..., :half], vectors[..., half:])
    )
    turned = (first + 1j * second) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def latent_attention(weights, hidden, position, sizes, *, scale, eps, inverse_frequency, magnitude, interleaved):
    """The layer's output for every token of one row, hidden [M, D]; sizes: heads, nope, rope, value, rank."""
    num_heads, nope, rope, value, rank = sizes
    weights = {name: np.asarray(weight, np.float64) for name, weight in weights.items()}
    hidden = np.asarray(hidden, np.float64)
    turn = lambda vectors: rotated(vectors, position, inverse_frequency, magnitude, interleaved)

    def project(name, inputs):
        return inputs @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    if "q_proj.weight" in weights:
        queries = project("q_proj", hidden)
    else:
        queries = project("q_b_proj", rms_norm(project("q_a_proj", hidden), weights["q_a_layernorm.weight"], eps))
    queries = queries.reshape(len(hidden), num_heads, nope + rope)
    queries = np.concatenate([queries[..., :nope], turn(queries[..., nope:])], axis=-1)

    down = project("kv_a_proj_with_mqa", hidden)
    latents = rms_norm(down[:, :rank], weights["kv_a_layernorm.weight"], eps)
    both = project("kv_b_proj", latents).reshape(len(hidden), num_heads, nope + value)
    rope_keys = np.repeat(turn(down[:, None, rank:]), num_heads, axis=1)
    keys = np.concatenate([both[..., :nope], rope_keys], axis=-1)

    before = np.arange(len(hidden))
    mixed = [attention(query, keys, both[..., nope:], before <= token, scale) for token, query in enumerate(queries)]
    return project("o_proj", np.reshape(mixed, (len(hidden), -1)))
