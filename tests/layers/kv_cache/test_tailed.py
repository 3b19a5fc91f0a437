"""A tailed cache refuses a policy that leaves gaps between its tokens."""

import jax.numpy as jnp
import pytest

from decodax.layers.kv_cache.full import MarkedCache
from decodax.layers.kv_cache.tailed import TailedCache


def test_a_tail_has_no_gaps():
    with pytest.raises(ValueError, match="has to run for every token"):
        TailedCache.empty(3, 2, 13, 7, (3, 11), jnp.float32, MarkedCache)
