"""The short convolution equals its definition, at once and in forwards of some tokens each."""

import numpy as np
import pytest

from decodax.layers.mixers.short_convolution import ShortConvolutionConfig
from tests.layers.mixers.recurrent_layers import Layer, close, hidden_states, in_forwards

CHANNELS = 7


def oracle(weights, hidden):
    def project(name):
        return hidden @ weights[name].T + weights.get(f"{name}_bias", 0.0)

    columns, taps = project("input_gate") * project("value"), weights["convolution"].shape[1]
    summed = np.zeros_like(columns) + weights.get("convolution_bias", 0.0)
    for token in range(len(hidden)):
        for back in range(min(taps, token + 1)):
            summed[token] += weights["convolution"][:, taps - 1 - back] * columns[token - back]
    return (project("output_gate") * summed) @ weights["out"].T + weights.get("out_bias", 0.0)


@pytest.mark.parametrize("options", [{"width": 3}, {"width": 5, "bias": True}])
def test_equals_the_definition(options):
    layer = Layer(ShortConvolutionConfig(CHANNELS, **options), oracle)
    hidden = hidden_states(23, batch=2)
    want = layer.want(hidden)
    for sizes in ((23,), (1, 1, 9, 12)):
        got, cache = in_forwards(layer, hidden, sizes)
        close(got, want)
        np.testing.assert_array_equal(cache.length, 23)


def test_the_layer_of_lfm2():
    """2.6B: width 2048, three taps; two columns of 2048 numbers are all that a row keeps."""
    config = ShortConvolutionConfig(2048, 3)
    shapes = {name: weight.shape for name, weight in config.weights(2048).items()}
    assert shapes["value"] == (2048, 2048) and shapes["convolution"] == (2048, 3) and len(shapes) == 5
    cache = config.empty_cache(3, 10**9, np.float16)
    assert cache.state.nbytes == 0 and cache.tail.nbytes == 3 * 2 * 2048 * 2


def test_bad_configs():
    with pytest.raises(ValueError, match="width must be at least 2 tokens, got 1"):
        ShortConvolutionConfig(CHANNELS, 1)
