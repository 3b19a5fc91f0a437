"""Every strategy by name keeps the contract: `decodax.generate` with the embedded model and the weights that it brings.

Greedy and sampled rows are in one batch, so that one program per strategy serves all. A strategy that needs another
model has it in `OTHER_MODELS`. Loops take seconds to compile, so those of all but `QUICK` are slow tests, of which a
sample runs every time; drafters and layer policies have tests of their own (`test_drafters.py`, `test_early_exit.py`).
"""

import re
import sys
from functools import cache, partial
from math import ceil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax import decoding
from decodax.decoding.drafters import DynamicExit, EarlyLayers, Kangaroo
from decodax.decoding.early_exit import AllLayers, RoutedLayers, SkipDecode, SpeculativeExit
from decodax.decoding.prompts import encode_prompts
from decodax.decoding.strategies import METHODS, DraftingStrategy
from tests import budget

EMBEDDED = (None, None)  # a folder, and an adapter
OTHER_MODELS = {
    "layer_skip": (None, "layer_skip"),
    "del": (None, "layer_skip"),
    "mtp": (Path(__file__).parents[1] / "golden" / "deepseek_v3_mtp", None),  # without a tokenizer
}
QUICK = ("autoregressive", "prompt_lookup", "draft_model", "medusa")  # without a draft, with a chain, with a tree
PROMPTS = ["def fibonacci(n):", "import os\n\nclass Stack:\n    def", "for", "x = [1, 2, 3]\nprint("]
IDS = [np.random.default_rng(length).integers(3, 50, length) for length in (5, 11, 1, 7)]
TEMPERATURE, SEED, NEW = [0.0, 0.8, 0.0, 1.2], [1, 2, 3, 4], 24
GREEDY = [row for row, temperature in enumerate(TEMPERATURE) if temperature == 0]
NO_STOP = 2  # a token that no row emits
# Logits of some 20 in float32; rounding errors of 1e-6 add up over 8 layers of sums over hundreds of products.
TOLERANCE = 1e-3


def is_lossless(name):
    return name == "autoregressive" or METHODS[name].lossless


def marked(names):
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


STRATEGIES = [name for name in METHODS if name != "autoregressive"]
each_strategy = pytest.mark.parametrize("name", marked(METHODS))


@cache
def load(folder, adapter):
    return decodax.load(folder, dtype="float32", adapter=adapter)


def model_of(name):
    return OTHER_MODELS.get(name, EMBEDDED)


def prompts_of(lm):
    return IDS if lm.tokenizer is None else PROMPTS


@cache
def run(model, strategy, order=(0, 1, 2, 3), stop=NO_STOP):
    """Some of the rows, each with its own temperature and seed. Always one stop token, which changes no program."""
    lm = load(*model)
    prompts, temperature, seed = ([rows[row] for row in order] for rows in (prompts_of(lm), TEMPERATURE, SEED))
    options = {"temperature": temperature, "seed": seed, "stop_token_ids": [stop]}
    return decodax.generate(lm, prompts, max_new_tokens=NEW, strategy=strategy, **options)


def generate(name, **changes):
    return run(model_of(name), name, **changes)


@pytest.mark.parametrize("name", marked(STRATEGIES))
@pytest.mark.quick_cases(2)
def test_greedy_tokens_are_those_of_plain_decoding_where_the_strategy_is_lossless(name):
    out, plain = generate(name), run(model_of(name), "autoregressive")
    assert out.stats.strategy == name and out.stats.fallback is None
    assert [len(row) for row in out.tokens] == [NEW] * len(PROMPTS) and out.finish_reasons == ["length"] * len(PROMPTS)
    if not METHODS[name].lossless:
        return
    assert out.stats.tokens_per_forward > 1  # otherwise nothing was tested
    for row in GREEDY:
        np.testing.assert_array_equal(out.tokens[row], plain.tokens[row])
        np.testing.assert_allclose(out.logprobs[row], plain.logprobs[row], atol=TOLERANCE)
        assert out.text is None or out.text[row] == plain.text[row]


@each_strategy
def test_a_row_is_the_same_elsewhere_in_the_batch(name):
    order = (3, 1, 0, 2)
    assert_same_rows(generate(name, order=order), generate(name), order)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_row_alone_is_the_row_in_the_batch(name):
    for row in (0, 1):  # a greedy and a sampled one
        assert_same_rows(generate(name, order=(row,)), generate(name), (row,))


def assert_same_rows(got, want, order):
    for mine, row in enumerate(order):
        np.testing.assert_array_equal(got.tokens[mine], want.tokens[row])
        np.testing.assert_allclose(got.logprobs[mine], want.logprobs[row], atol=TOLERANCE)


OPENED: set[str] = set()
sys.addaudithook(lambda event, arguments: OPENED.add(str(arguments[0])) if event == "open" else None)


@each_strategy
def test_a_second_call_compiles_nothing_and_reads_no_file(name):
    """Not even of the weights that the strategy brings, or changes. Few strategies of a model are kept at a time."""
    call = partial(run.__wrapped__, model_of(name), name)
    first, num_programs = call(), budget.num_programs()
    OPENED.clear()
    again = call()
    assert budget.num_programs() == num_programs
    assert not [path for path in OPENED if path.endswith((".json", ".safetensors", ".npz"))]
    for mine, theirs in zip(again.tokens, first.tokens, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@each_strategy
def test_a_stop_token_ends_each_row_that_emits_it(name):
    whole = generate(name).tokens
    stop = int(whole[0][10])
    out = generate(name, stop=stop)
    for row, tokens in enumerate(whole):
        end = next((place + 1 for place, token in enumerate(tokens) if token == stop), None)
        np.testing.assert_array_equal(out.tokens[row], tokens[:end])
        assert len(out.logprobs[row]) == len(out.tokens[row])
        assert out.finish_reasons[row] == ("length" if end is None else "stop")
    assert len(out.tokens[0]) <= 11


def layers_needed(lm, made, stats):
    """The least and the most that `row_layers` can be, by its definition and the counts of drafts.

    They are equal where the layers of a round are known beforehand.
    """
    total, rounds = stats.num_layers, sum(stats.accepted_lengths)
    full, nodes, rows = total * rounds, made.drafter.num_nodes, len(PROMPTS)
    match made.layer_policy:
        case SpeculativeExit():
            return rounds, full - 1  # some token exits early
        case RoutedLayers() as layer_policy:  # decided by the prompts, for all tokens of a row
            ids = encode_prompts(lm, prompts_of(lm))
            tokens = np.stack([np.pad(row, (0, max(map(len, ids)) - len(row))) for row in ids])
            lengths = np.array([len(row) for row in ids])
            state = decoding.prefill(
                lm.model, made.params, tokens, lengths, NEW, np.arange(rows), layer_policy=layer_policy,
                stop_token_ids=[NO_STOP],
            )  # fmt: skip
            return (NEW * int(jnp.sum(state.layer_policy)),) * 2
        case SkipDecode() as layer_policy:
            falling = (layer_policy.max_layers - layer_policy.min_layers) / layer_policy.decay_tokens
            layers = [
                max(layer_policy.min_layers, ceil(layer_policy.max_layers - falling * count)) for count in range(NEW)
            ]
            return (rows * sum(layers),) * 2
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
            return full + beside, full + min(rows * beside, (total - 1) * (nodes - 1) * rounds)
    return full, full


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_a_strategy_builds_fits_the_model(name):
    """Its drafter and its layer policy take the weights that come with it; the model's own are all there."""
    lm = load(*model_of(name))
    made = METHODS[name]().build(lm)
    params = lm.params if made.params is None else made.params
    made.drafter.check(lm.model, made.draft_params)
    made.layer_policy.check(lm.model, params)
    assert made.drafter.children in made.verifier.supported_children
    assert jax.tree.structure(lm.params) == jax.tree.structure({key: params[key] for key in lm.params})


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_draft_has_the_number_of_tokens_asked_for(name):
    strategy, models = METHODS[name], {model_of(name), (model_of(name)[0], None)}  # early exits need no adapter
    for lm in (load(*model) for model in models):
        if not issubclass(strategy, DraftingStrategy):
            assert strategy().build(lm).drafter.max_depth == 0
            continue
        least = 1
        if name == "ppd":  # prompt tokens need room, too
            with pytest.raises(ValueError, match="draft_tokens must be at least") as refused:
                strategy(1).build(lm)
            least = int(re.search(r"at least (\d+)", str(refused.value))[1])
            with pytest.raises(ValueError, match="draft_tokens must be at least"):
                strategy(least - 1).build(lm)
        for number in (least, least + 2, least + 4):
            drafter = strategy(number).build(lm).drafter
            assert drafter.num_nodes == number + 1 and 1 <= drafter.max_depth <= number


@pytest.mark.parametrize("name", marked(STRATEGIES))
def test_layers_are_counted(name):
    lm, stats = load(*model_of(name)), generate(name).stats
    least, most = layers_needed(lm, METHODS[name]().build(lm), stats)
    assert least <= stats.row_layers <= most


@cache
def to_the_end(model, strategy):
    """Two rows that end where the context does: one has a single token left."""
    lm = load(*model)
    context, random = lm.config.max_position_embeddings, np.random.default_rng(0)
    rows = [random.integers(3, lm.config.vocab_size, length) for length in (context - 1, context - 29)]
    return decodax.generate(lm, rows, max_new_tokens=context, stop_token_ids=[], strategy=strategy)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_rows_end_exactly_where_the_context_ends(name):
    out = to_the_end(model_of(name), name)
    assert [len(tokens) for tokens in out.tokens] == [len(scores) for scores in out.logprobs] == [1, 29]
    assert out.finish_reasons == ["length"] * 2
    assert all(np.isfinite(scores).all() for scores in out.logprobs)
    if is_lossless(name):
        for got, want in zip(out.tokens, to_the_end(model_of(name), "autoregressive").tokens, strict=True):
            np.testing.assert_array_equal(got, want)
