"""With `batch_size` every row has the tokens that it has alone, whatever stands beside it and whenever it joined."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import decodax
from decodax.decoding import refilled
from decodax.models.load import LanguageModel
from tests.decoding.test_generation import LETTERS, letter_tokenizer
from tests.model_kinds import LAYERS, VOCABULARY, model_of, params_of

COUNT = 11
LENGTHS = np.random.default_rng(3).integers(1, 16, COUNT)
PROMPTS = [np.random.default_rng(length).integers(0, VOCABULARY, length).tolist() for length in LENGTHS]
SAMPLED = {"temperature": [0.0, 0.7, 1.3, 0.9] * 2 + [0.5] * 3, "frequency_penalty": 0.2, "seed": 5}


def lm_of(kind):
    model = model_of(kind)
    return LanguageModel(model, model.config, params_of(kind), None, Path("tiny"), (3,))


def both(lm, **options):
    """All prompts in one batch, and with four rows that are refilled."""
    given = {"max_new_tokens": 17, **options}
    refill = {"batch_size": 4, "block_tokens": 3, **given}
    return decodax.generate(lm, PROMPTS, **given), decodax.generate(lm, PROMPTS, **refill)


def assert_same(got, wanted):
    for mine, theirs in zip(got.tokens, wanted.tokens, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for mine, theirs in zip(got.logprobs, wanted.logprobs, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
    assert (got.finish_reasons, got.seeds, got.text) == (wanted.finish_reasons, wanted.seeds, wanted.text)
    assert got.stats.num_new_tokens == wanted.stats.num_new_tokens


@pytest.mark.parametrize("strategy", ["autoregressive", "prompt_lookup"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.quick_cases(2)
def test_rows_are_those_of_one_batch(kind, strategy):
    wanted, got = both(lm_of(kind), strategy=strategy, **SAMPLED)
    assert_same(got, wanted)
    assert len({len(tokens) for tokens in got.tokens}) > 1  # rows end at different times
    for name in ("accepted_lengths", "proposed", "accepted", "row_layers", "num_prompt_tokens"):
        assert getattr(got.stats, name) == getattr(wanted.stats, name), name


@pytest.mark.parametrize("strategy", ["draft_model", "medusa", "ppd", "kangaroo", "skip_decode", "specee"])
@pytest.mark.quick_cases(1)
def test_every_kind_of_draft_and_layer_policy_of_the_embedded_model(strategy):
    lm = decodax.load(dtype="float32")
    prompts = [f"def f{index}({'abcdefgh'[: index % 5]}):" for index in range(7)]
    options = {"max_new_tokens": 19, "temperature": [0.0, 0.8, 0.0, 0.6, 0.9, 0.0, 1.1], "strategy": strategy}
    wanted = decodax.generate(lm, prompts, **options)
    assert_same(decodax.generate(lm, prompts, batch_size=3, block_tokens=4, **options), wanted)


def test_stop_strings_streaming_and_samples():
    model = model_of("moe")
    lm = LanguageModel(model, model.config, params_of("moe"), letter_tokenizer(), Path("tiny"), ())
    prompts = ["".join(LETTERS[token] for token in prompt) for prompt in PROMPTS]
    options = {"max_new_tokens": 15, "temperature": 0.9, "n": 2, "seed": 3}
    stop = decodax.generate(lm, prompts, **options).text[4][6:8]
    pieces = dict.fromkeys(range(2 * COUNT), "")

    def collect(row, piece):
        pieces[row] += piece

    wanted = decodax.generate(lm, prompts, stop=[stop], **options)
    got = decodax.generate(lm, prompts, stop=[stop], batch_size=5, block_tokens=4, on_text=collect, **options)
    assert_same(got, wanted)
    assert got.finish_reasons[4] == "stop" and list(pieces.values()) == got.text


def test_a_refill_compiles_once_for_each_power_of_two(monkeypatch):
    sizes, lm = [], lm_of("moe")
    put = refilled.put_rows_in_place

    def counted(constrained, state, places, fresh):
        sizes.append(len(places))
        return put(constrained, state, places, fresh)

    monkeypatch.setattr(refilled, "put_rows_in_place", counted)
    decodax.generate(lm, PROMPTS, batch_size=4, block_tokens=2, max_new_tokens=9)
    assert len(sizes) > 2 and set(sizes) <= {1, 2, 4}


def test_a_failed_row_leaves_the_others(monkeypatch):
    lm = lm_of("moe")
    broken = jax.tree.map(lambda leaf: leaf, lm.params)
    broken["embedding"] = broken["embedding"].at[PROMPTS[2][0]].set(np.nan)
    prompts = [[t for t in prompt if t != PROMPTS[2][0]] or [1] for prompt in PROMPTS]
    prompts[2] = PROMPTS[2]
    out = decodax.generate(
        dataclasses.replace(lm, params=broken),
        prompts,
        batch_size=3,
        max_new_tokens=6,
        logit_bias={PROMPTS[2][0]: -1e9},
    )
    assert [index for index, reason in enumerate(out.finish_reasons) if reason == "failed"] == [2]


def test_batch_size_is_checked():
    with pytest.raises(ValueError, match="batch_size must be a whole number, at least 1, got 0"):
        both(lm_of("moe"), batch_size=0)
