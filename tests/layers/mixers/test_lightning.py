"""Lightning attention equals its recurrence, in chunks and over many steps; its slopes are those of the papers."""

import numpy as np
import pytest

from decodax.layers.mixers.lightning import LightningConfig, minimax_slopes, transnormer_slopes
from decodax.layers.norm import RMSNormConfig
from tests.layers.mixers.recurrent_layers import Layer, check_chunks, check_long
from tests.oracles.recurrence import recurrence, rms_norm, sigmoid, silu

SLOPES = (0.9, 0.0, 0.01)  # the second head has no decay


def config(**changed):
    options = {"num_heads": 3, "head_size": 5, "slopes": SLOPES, "activation": "silu", "scale": 1.0}
    return LightningConfig(**(options | {"norm": RMSNormConfig(1e-6)} | changed))


def oracle(weights, hidden):
    heads = silu(hidden @ weights["query_key_value"].T).reshape(len(hidden), 3, 15)
    query, key, value = heads[:, :, :5], heads[:, :, 5:10], heads[:, :, 10:]
    log_decay = np.broadcast_to(-np.array(SLOPES)[None, :, None], (len(hidden), 3, 1))
    read, _, _ = recurrence(query, key, value, log_decay, np.zeros((3, 5, 5)), scale=1.0)
    normed = rms_norm(read.reshape(len(hidden), -1), weights["norm"]["weight"], 1e-6)
    return (sigmoid(hidden @ weights["gate"].T) * normed) @ weights["out"].T


@pytest.fixture(scope="module")
def layer():
    return Layer(config(), oracle)


def test_it_is_its_recurrence(layer):
    check_chunks(layer)


def test_ten_thousand_steps(layer):
    # The head without decay sums 10,000 tokens: sqrt(10,000) roundings of 6e-8 and some.
    check_long(layer, 1e-4)


def test_slopes():
    """MiniMax-01 as transformers computes them; TransNormerLLM by its formula."""
    base = np.array([2.0**-4, 2.0**-8])
    np.testing.assert_allclose(minimax_slopes(2, 0, 3), base * (1 + 1e-5), rtol=1e-12)
    np.testing.assert_allclose(minimax_slopes(2, 2, 3), base * (1 - 2 / (2 + 1e-5) + 1e-5), rtol=1e-12)
    assert min(minimax_slopes(64, 79, 80)) > 0
    np.testing.assert_allclose(transnormer_slopes(4, 1, 3), np.array([0, 2, 4, 6]) * 2 / 3, rtol=1e-12)


def test_bad_configs():
    with pytest.raises(ValueError, match=r"slopes must be 3 numbers \(one per head\) of at least 0, got \(0.9, -0.1"):
        config(slopes=(0.9, -0.1, 0.01))
    with pytest.raises(ValueError, match="slopes must be 2 numbers"):
        config(num_heads=2)
    with pytest.raises(ValueError, match=r"activation must be None or one of .*, got 'swish'"):
        config(activation="swish")
