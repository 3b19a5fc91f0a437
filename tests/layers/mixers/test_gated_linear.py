"""Gated linear attention equals its recurrence, in chunks and over many steps."""

import numpy as np
import pytest

from decodax.layers.mixers.gated_linear import GatedLinearConfig
from decodax.layers.norm import RMSNormConfig
from tests.layers.mixers.recurrent_layers import Layer, check_chunks, check_long
from tests.oracles.recurrence import recurrence, rms_norm, silu

CONFIG = GatedLinearConfig(
    num_heads=3, key_size=5, value_size=7, gate_rank=2, gate_temperature=4.0, scale=0.4, norm=RMSNormConfig(1e-5)
)


def oracle(weights, hidden):
    heads = {name: hidden @ weights[name].T for name in ("query", "key", "value", "gate")}
    heads = {name: flat.reshape(len(hidden), 3, -1) for name, flat in heads.items()}
    decay = hidden @ weights["decay_down"].T @ weights["decay_up"].T + weights["decay_bias"]
    log_decay = -np.logaddexp(0, -decay).reshape(len(hidden), 3, 5) / 4
    state = np.zeros((3, 5, 7))
    read, _, _ = recurrence(heads["query"], heads["key"], heads["value"], log_decay, state, scale=0.4)
    gated = rms_norm(read, weights["norm"]["weight"], 1e-5) * silu(heads["gate"])
    return gated.reshape(len(hidden), -1) @ weights["out"].T


@pytest.fixture(scope="module")
def layer():
    return Layer(CONFIG, oracle)


def test_it_is_its_recurrence(layer):
    check_chunks(layer)


def test_ten_thousand_steps(layer):
    # Decays leave some ten tokens in the state, so errors do not accumulate.
    check_long(layer, 1e-4)


def test_the_layer_of_the_paper():
    """340 million parameters: width 1024, 4 heads, keys half as wide; a state of 4 x 128 x 256 numbers."""
    config = GatedLinearConfig(4, 128, 256, 16, 16.0, 128**-0.5, RMSNormConfig(1e-5))
    shapes = {name: weight.shape for name, weight in config.weights(1024).items() if name != "norm"}
    assert shapes["query"] == shapes["key"] == (512, 1024) and shapes["value"] == shapes["gate"] == (1024, 1024)
    assert shapes["decay_down"] == (16, 1024) and shapes["decay_up"] == (512, 16)
    assert config.empty_cache(2, 10**9, np.float16).state.nbytes == 2 * 4 * 128 * 256 * 4


def test_bad_configs():
    with pytest.raises(ValueError, match=r"gate_temperature positive, got .* and 0"):
        GatedLinearConfig(3, 5, 7, 2, 0.0, 0.4, RMSNormConfig(1e-5))
