"""The embedded model with the parts that it brings, by name: lossless strategies write what plain decoding writes."""

import numpy as np
import pytest

import decodax
from decodax.decoding.strategies import METHODS, Strategy

PROMPTS = ["def fibonacci(n):", "import os\n\nclass Stack:\n    def", "for"]
NEW = 32
NAMES = [name for name, method in METHODS.items() if isinstance(method, type) and issubclass(method, Strategy)]
EXITS_EARLY = ("layer_skip", "del")


def write(lm, **options):
    return decodax.generate(lm, PROMPTS, max_new_tokens=NEW, stop_token_ids=[], **options)


@pytest.fixture(scope="module")
def models():
    """The embedded model, and the one that was taught to exit early, each with its plain text."""
    pair = decodax.load(dtype="float32"), decodax.load(dtype="float32", adapter="layer_skip")
    return [(lm, write(lm)) for lm in pair]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_named_strategy_writes(models, name):
    lm, plain = models[name in EXITS_EARLY]
    out = write(lm, strategy=name)
    assert [len(row) for row in out.tokens] == [NEW] * len(PROMPTS)
    if METHODS[name].lossless:
        np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert out.stats.tokens_per_forward > 1 or not METHODS[name].lossless
    assert out.stats.row_layers <= out.stats.num_layers * NEW * len(PROMPTS) * 2


@pytest.mark.parametrize("name", ["ppd", "medusa"])
def test_parts_for_the_tree_s_own_forward(models, name):
    """Two of them in every run; all with `pytest -m slow`."""
    lm, plain = models[0]
    out = write(lm, strategy=name)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert out.stats.tokens_per_forward == out.stats.tokens_per_full_depth > 1.1
