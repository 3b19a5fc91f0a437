"""The embedded model with the parts that it brings, by name: lossless strategies write what plain decoding writes."""

from math import ceil

import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax import decoding
from decodax.decoding.depth import FullDepth, RoutedLayers, SkipDecode, SpeculativeExit
from decodax.decoding.drafters import DynamicExit, EarlyLayers, Kangaroo
from decodax.decoding.prompts import encode_prompts
from decodax.decoding.strategies import METHODS, Strategy

PROMPTS = ["def fibonacci(n):", "import os\n\nclass Stack:\n    def", "for"]
NEW = 32
NOT_SHIPPED = ("mtp",)  # the embedded model's family has no layer for further tokens
NAMES = [
    name
    for name, method in METHODS.items()
    if isinstance(method, type) and issubclass(method, Strategy) and name not in NOT_SHIPPED
]
EXITS_EARLY = ("layer_skip", "del")


def write(lm, **options):
    return decodax.generate(lm, PROMPTS, max_new_tokens=NEW, stop_token_ids=[], **options)


@pytest.fixture(scope="module")
def models():
    """The embedded model, and the one that was taught to exit early, each with its plain text."""
    pair = decodax.load(dtype="float32"), decodax.load(dtype="float32", adapter="layer_skip")
    return [(lm, write(lm)) for lm in pair]


def row_layers(lm, made, stats):
    """The least and the most that `row_layers` can be, by its definition and the counts of drafts.

    They are one number where the layers of a round are known beforehand.
    """
    total, rounds = stats.num_layers, sum(stats.accepted_lengths)
    full, nodes = total * rounds, made.drafter.num_nodes
    match made.depth:
        case SpeculativeExit():
            return rounds, full - 1  # some token leaves early
        case RoutedLayers() as depth:  # decided by the prompts, for every token
            ids = encode_prompts(lm, PROMPTS)
            tokens = np.stack([np.pad(row, (0, max(map(len, ids)) - len(row))) for row in ids])
            lengths = np.array([len(row) for row in ids])
            state = decoding.init(
                lm.model, made.params, tokens, lengths, NEW, np.zeros(len(ids), np.int64), depth=depth
            )
            return (NEW * int(jnp.sum(state.depth)),) * 2
        case SkipDecode() as depth:
            falling = (depth.max_layers - depth.min_layers) / depth.decay_tokens
            layers = [max(depth.min_layers, ceil(depth.max_layers - falling * count)) for count in range(NEW)]
            return (len(PROMPTS) * sum(layers),) * 2
        case FullDepth():
            pass
    match made.drafter:
        case EarlyLayers(exit_layer=exit_layer):  # every node but the pending one beside a whole forward
            return (full + (nodes - 1) * exit_layer * rounds,) * 2
        case Kangaroo(exit_layer=exit_layer):  # each draft tries one token at least, and all that came to be judged
            return full + exit_layer * max(rounds, sum(stats.offered)), full + (nodes - 1) * exit_layer * rounds
        case DynamicExit():  # rows that are not done ask for what the batch runs: the last one always, none for more
            beside = stats.layer_forwards - total * stats.target_forwards
            drafted = stats.draft_forwards - stats.target_forwards
            assert drafted <= beside <= (total - 1) * drafted
            return full + beside, full + min(len(PROMPTS) * beside, (total - 1) * (nodes - 1) * rounds)
    return full, full


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_named_strategy_writes(models, name):
    lm, plain = models[name in EXITS_EARLY]
    out = write(lm, strategy=name)
    assert [len(row) for row in out.tokens] == [NEW] * len(PROMPTS)
    if METHODS[name].lossless:
        np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert out.stats.tokens_per_forward > 1 or not METHODS[name].lossless
    least, most = row_layers(lm, METHODS[name].build(lm, None, None), out.stats)
    assert least <= out.stats.row_layers <= most


@pytest.mark.parametrize("name", ["ppd", "medusa"])
def test_parts_for_the_tree_s_own_forward(models, name):
    """Two of them in every run; all with `pytest -m slow`."""
    lm, plain = models[0]
    out = write(lm, strategy=name)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert out.stats.tokens_per_forward == out.stats.tokens_per_full_depth > 1.1
