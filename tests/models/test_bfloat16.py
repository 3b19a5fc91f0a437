"""Logits in bfloat16 are as near to exact ones as those that transformers computes in bfloat16, family by family.

Exact: the same rounded weights, computed in float32. A bfloat16 number is off by up to 2^-8 of it, and a token's hidden
state is rounded some eight times a layer (norms, projections, attention, activation, sums), so its logits are off by
about 2^-8 sqrt(8 layers) of theirs. That holds for most tokens: where two experts are near a tie, rounding may choose
the other one, for this token and so for those after it, in either implementation.
"""

from functools import cache

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import decodax
from decodax.models.families import FAMILIES
from tests.golden_files import load_golden, logits_of

SHARE_WITHOUT_A_TIE = 0.7


@cache
def errors(name):
    """Root mean square of each prompt token's logits' errors over that of all logits: ours, transformers'; layers."""
    golden, lm = load_golden(name), decodax.load(load_golden(name).folder, dtype="bfloat16")
    with np.load(golden.folder / "golden_bfloat16.npz") as file:
        theirs = file["bits"].view(ml_dtypes.bfloat16).astype(np.float64)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), lm.params)
    ours, exact = (logits_of(golden, lm, params) for params in (lm.params, wide))
    is_prompt = np.arange(ours.shape[1])[None, :] < golden.length[:, None]
    scale = np.sqrt(np.mean(exact[is_prompt] ** 2))
    of_tokens = [np.sqrt(np.mean((given - exact)[is_prompt] ** 2, axis=1)) / scale for given in (ours, theirs)]
    return *of_tokens, lm.config.num_layers


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.quick_cases(1)
def test_errors_are_those_of_the_dtype(name):
    ours, theirs, num_layers = errors(name)
    limit = 2**-8 * np.sqrt(8 * num_layers)
    # The exact logits are near what transformers rounds; recurrent layers round up to 11 times: sqrt(11 / 8) < 1.2.
    assert np.median(theirs) < 1.2 * limit
    assert np.mean(ours < max(limit, 2 * np.median(theirs))) >= SHARE_WITHOUT_A_TIE  # Qwen3-Next rounds more numbers
    assert np.median(ours) > 2**-12  # it did run in bfloat16
    assert np.median(ours) < 1.5 * np.median(theirs)  # of 39 tokens, so that medians vary by tens of percent
