"""A tree of the root alone in the speculative loop is plain decoding, and its layers are counted."""

import jax
import numpy as np

from decodax import decoding
from decodax.decoding.drafters import NoDraft
from decodax.decoding.verifiers import ExactMatch
from tests.speculation import LENGTHS, MODEL, PARAMS, assert_same, plain, start


def test_it_is_plain_decoding():
    state = jax.jit(decoding.speculative(MODEL, NoDraft(), ExactMatch()))(PARAMS, None, start(options="every option"))
    assert_same(state, plain("every option"))
    new = np.asarray(state.length) - LENGTHS
    np.testing.assert_array_equal(state.layer_counts.row, MODEL.config.num_layers * new)
    assert int(state.layer_counts.batch) == MODEL.config.num_layers * new.max()
    np.testing.assert_array_equal(state.layer_counts.row, plain("every option").layer_counts.row)
