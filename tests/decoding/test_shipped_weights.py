"""The embedded model runs every strategy with its own auxiliary weights; lossless ones give plain decoding's text."""

from math import ceil

import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax import decoding
from decodax.decoding.drafters import DynamicExit, EarlyLayers, Kangaroo
from decodax.decoding.early_exit import AllLayers, RoutedLayers, SkipDecode, SpeculativeExit
from decodax.decoding.prompts import encode_prompts
from decodax.decoding.strategies import METHODS, Strategy

PROMPTS = ["def fibonacci(n):", "import os\n\nclass Stack:\n    def", "for"]
NEW = 32
NOT_SHIPPED = ("mtp",)  # the embedded model's family has no MTP head
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
    """The embedded model, and the one trained to exit early, each with its plain text."""
    pair = decodax.load(dtype="float32"), decodax.load(dtype="float32", adapter="layer_skip")
    return [(lm, write(lm)) for lm in pair]


def row_layers(lm, made, stats):
    """The least and the most that `row_layers` can be, by its definition and the counts of drafts.

    They are equal where the layers of a round are known beforehand.
    """
    total, rounds = stats.num_layers, sum(stats.accepted_lengths)
    full, nodes = total * rounds, made.drafter.num_nodes
    match made.layer_policy:
        case SpeculativeExit():
            return rounds, full - 1  # some token exits early
        case RoutedLayers() as layer_policy:  # decided by the prompts, for all tokens of a row
            ids = encode_prompts(lm, PROMPTS)
            tokens = np.stack([np.pad(row, (0, max(map(len, ids)) - len(row))) for row in ids])
            lengths = np.array([len(row) for row in ids])
            state = decoding.prefill(
                lm.model, made.params, tokens, lengths, NEW, np.zeros(len(ids), np.int64), layer_policy=layer_policy
            )
            return (NEW * int(jnp.sum(state.layer_policy)),) * 2
        case SkipDecode() as layer_policy:
            falling = (layer_policy.max_layers - layer_policy.min_layers) / layer_policy.decay_tokens
            layers = [
                max(layer_policy.min_layers, ceil(layer_policy.max_layers - falling * count)) for count in range(NEW)
            ]
            return (len(PROMPTS) * sum(layers),) * 2
        case AllLayers():
            pass
    match made.drafter:
        case EarlyLayers(exit_layer=exit_layer):  # every node but the last one beside a full forward
            return (full + (nodes - 1) * exit_layer * rounds,) * 2
        case Kangaroo(exit_layer=exit_layer):  # each draft holds at least one token, and all that were verified
            return full + exit_layer * max(rounds, sum(stats.proposed)), full + (nodes - 1) * exit_layer * rounds
        case DynamicExit():  # rows that are not done want what the batch runs: the last one always, none for more
            beside = stats.layer_forwards - total * stats.target_forwards
            drafted = stats.draft_forwards - stats.target_forwards
            assert drafted <= beside <= (total - 1) * drafted
            return full + beside, full + min(len(PROMPTS) * beside, (total - 1) * (nodes - 1) * rounds)
    return full, full


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_named_strategy_generates(models, name):
    lm, plain = models[name in EXITS_EARLY]
    out = write(lm, strategy=name)
    assert [len(row) for row in out.tokens] == [NEW] * len(PROMPTS)
    if METHODS[name].lossless:
        np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert out.stats.tokens_per_forward > 1 or not METHODS[name].lossless
    least, most = row_layers(lm, METHODS[name].build(lm, None, None), out.stats)
    assert least <= out.stats.row_layers <= most


@pytest.mark.parametrize("name", ["ppd", "medusa"])
def test_auxiliary_weights_with_the_forward_of_the_tree(models, name):
    """Two of them in every run; all with `pytest -m slow`."""
    lm, plain = models[0]
    out = write(lm, strategy=name)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert out.stats.tokens_per_forward == out.stats.tokens_per_full_forward > 1.1
