"""The gated delta layer equals its recurrence after its convolution, in chunks and over many steps."""

import numpy as np
import pytest

from decodax.layers.mixers.gated_delta import GatedDeltaConfig
from decodax.layers.norm import RMSNormConfig
from tests.layers.mixers.recurrent_layers import Layer, check_chunks, check_long
from tests.oracles.recurrence import recurrence, rms_norm, sigmoid, silu

KEYS, GROUP, KEY_SIZE, VALUE_SIZE, TAPS = 2, 3, 5, 7, 4


def config(**changed):
    sizes = {"num_key_heads": KEYS, "num_value_heads": KEYS * GROUP, "key_size": KEY_SIZE, "value_size": VALUE_SIZE}
    options = {"convolution_width": TAPS, "activation": "silu", "scale": 0.4, "norm": RMSNormConfig(1e-6)}
    return GatedDeltaConfig(**(sizes | options | changed))


def oracle(weights, hidden):
    """Head by head, from the layout of Qwen3-Next's fused weights: per key head q, k, G values, G gates; G b, G a."""
    tokens, per_head = len(hidden), 2 * KEY_SIZE + 2 * GROUP * VALUE_SIZE
    fused, pairs = hidden @ weights["query_key_value_gate"].T, hidden @ weights["beta_decay"].T
    columns, gates, betas, decays = ([], [], []), [], [], []
    for head in range(KEYS):
        own = fused[:, head * per_head : (head + 1) * per_head]
        bounds = np.cumsum([KEY_SIZE, KEY_SIZE, GROUP * VALUE_SIZE])
        query, key, value, gate = np.split(own, bounds, axis=1)
        for projected, new in zip(columns, (query, key, value), strict=True):
            projected.append(new)
        gates.append(gate.reshape(tokens, GROUP, VALUE_SIZE))
        beta, decay = np.split(pairs[:, head * 2 * GROUP : (head + 1) * 2 * GROUP], 2, axis=1)
        betas.append(beta)
        decays.append(decay)
    channels = np.concatenate([np.concatenate(one, axis=1) for one in columns], axis=1)
    convolved = np.zeros_like(channels)
    for token in range(tokens):
        for back in range(min(TAPS, token + 1)):
            convolved[token] += weights["convolution"][:, TAPS - 1 - back] * channels[token - back]
    convolved = silu(convolved)
    query, key, value = np.split(convolved, [KEYS * KEY_SIZE, 2 * KEYS * KEY_SIZE], axis=1)
    query, key = (x.reshape(tokens, KEYS, KEY_SIZE) for x in (query, key))
    query, key = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (query, key))
    query, key = (x[:, [0, 0, 0, 1, 1, 1]] for x in (query, key))
    value, beta = value.reshape(tokens, KEYS * GROUP, VALUE_SIZE), sigmoid(np.concatenate(betas, axis=1))
    softplus = np.logaddexp(0, np.concatenate(decays, axis=1) + weights["decay_bias"])
    log_decay = (-np.exp(weights["decay_rate"]) * softplus)[..., None]
    state = np.zeros((KEYS * GROUP, KEY_SIZE, VALUE_SIZE))
    read, _, _ = recurrence(query, key, value, log_decay, state, scale=0.4, beta=beta)
    gated = rms_norm(read, weights["norm"]["weight"], 1e-6) * silu(np.concatenate(gates, axis=1))
    return gated.reshape(tokens, -1) @ weights["out"].T


@pytest.fixture(scope="module")
def layer():
    made = Layer(config(), oracle)
    # Decays of 0.5 to 0.99 per token, so that chunks matter to each other.
    made.params["decay_rate"] = made.params["decay_rate"] - 3
    made.weights["decay_rate"] = made.weights["decay_rate"] - 3
    return made


def test_it_is_its_recurrence(layer):
    check_chunks(layer)


def test_ten_thousand_steps(layer):
    # The delta rule removes what it overwrites, so errors do not accumulate.
    check_long(layer, 1e-4)


def test_the_layer_of_qwen3_next():
    """80B-A3B: width 2048, 16 key heads and 32 value heads of 128; 2 MiB of state and a tail of 3 x 8192 columns."""
    made = config(num_key_heads=16, num_value_heads=32, key_size=128, value_size=128)
    shapes = {name: weight.shape for name, weight in made.weights(2048).items() if name != "norm"}
    assert shapes["query_key_value_gate"] == (12288, 2048) and shapes["beta_decay"] == (64, 2048)
    assert shapes["convolution"] == (8192, 4) and shapes["out"] == (2048, 4096)
    cache = made.empty_cache(3, 10**9, np.float16)
    assert cache.state.nbytes == 3 * 2 * 1024**2 and cache.tail.nbytes == 3 * 3 * 8192 * 2


def test_bad_configs():
    with pytest.raises(ValueError, match="multiple of num_key_heads, got 5 and 2"):
        config(num_value_heads=5)
    with pytest.raises(ValueError, match="convolution_width must be at least 2 tokens, got 1"):
        config(convolution_width=1)
    with pytest.raises(ValueError, match=r"activation must be one of .*, got 'swish'"):
        config(activation="swish")
