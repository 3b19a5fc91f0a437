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
    """One row: projections, convolutions token by token, then the recurrence."""
    tokens = len(hidden)

    def convolved(name):
        channels = hidden @ weights[name].T
        summed = np.zeros_like(channels)
        for token in range(tokens):
            for back in range(min(TAPS, token + 1)):
                summed[token] += weights[f"{name}_convolution"][:, TAPS - 1 - back] * channels[token - back]
        return silu(summed)

    query, key, value = map(convolved, ("query", "key", "value"))
    query, key = (x.reshape(tokens, KEYS, KEY_SIZE) for x in (query, key))
    query, key = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (query, key))
    query, key = (x[:, [0, 0, 0, 1, 1, 1]] for x in (query, key))
    value, beta = value.reshape(tokens, KEYS * GROUP, VALUE_SIZE), sigmoid(hidden @ weights["beta"].T)
    softplus = np.logaddexp(0, hidden @ weights["decay"].T + weights["decay_bias"])
    log_decay = (-np.exp(weights["decay_rate"]) * softplus)[..., None]
    state = np.zeros((KEYS * GROUP, KEY_SIZE, VALUE_SIZE))
    read, _, _ = recurrence(query, key, value, log_decay, state, scale=0.4, beta=beta)
    gate = (hidden @ weights["gate"].T).reshape(read.shape)
    gated = rms_norm(read, weights["norm"]["weight"], 1e-6) * silu(gate)
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
    assert shapes["query"] == shapes["key"] == (2048, 2048) and shapes["value"] == shapes["gate"] == (4096, 2048)
    assert shapes["beta"] == shapes["decay"] == (32, 2048) and shapes["out"] == (2048, 4096)
    assert shapes["query_convolution"] == (2048, 4) and shapes["value_convolution"] == (4096, 4)
    cache = made.empty_cache(3, 10**9, np.float16)
    assert cache.state.nbytes == 3 * 2 * 1024**2 and cache.tail.nbytes == 3 * 3 * 8192 * 2


def test_bad_configs():
    with pytest.raises(ValueError, match="multiple of num_key_heads, got 5 and 2"):
        config(num_value_heads=5)
    with pytest.raises(ValueError, match="convolution_width must be at least 2 tokens, got 1"):
        config(convolution_width=1)
    with pytest.raises(ValueError, match=r"activation must be one of .*, got 'swish'"):
        config(activation="swish")
