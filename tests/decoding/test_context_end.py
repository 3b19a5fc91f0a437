"""Rows end exactly where the model's context ends; with the embedded model see `contracts/test_strategies.py`."""

import dataclasses
import re

import jax
import numpy as np
import pytest

import decodax
from tests.decoding.test_generation import LM

CONTEXT = 61
SHORT = dataclasses.replace(
    LM,
    model=dataclasses.replace(LM.model, config=dataclasses.replace(LM.config, max_position_embeddings=CONTEXT)),
    config=dataclasses.replace(LM.config, max_position_embeddings=CONTEXT),
)
DRAFT = dataclasses.replace(
    SHORT, params=jax.tree.map(lambda leaf: leaf + 0.03 * jax.random.normal(jax.random.key(2), leaf.shape), LM.params)
)


def prompts(vocab_size, *lengths):
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(3, vocab_size, length) for length in lengths]


def check_end(lm, rows, **options):
    """Each row takes what is left of the context, and no less."""
    out = decodax.generate(lm, rows, max_new_tokens=lm.config.max_position_embeddings, stop_token_ids=[], **options)
    left = [lm.config.max_position_embeddings - len(row) for row in rows]
    assert [len(tokens) for tokens in out.tokens] == [len(scores) for scores in out.logprobs] == left
    assert out.finish_reasons == ["length"] * len(rows)
    assert all(np.isfinite(scores).all() for scores in out.logprobs)
    return out.tokens


@pytest.mark.parametrize("strategy", ["prompt_lookup", "draft_tree"])
@pytest.mark.quick_cases(1)
def test_drafts_reach_the_end_of_the_context_and_stop_there(strategy):
    rows = prompts(37, CONTEXT - 1, CONTEXT - 7, 5)
    draft = None if strategy == "prompt_lookup" else DRAFT
    plain = check_end(SHORT, rows)
    for got, want in zip(check_end(SHORT, rows, strategy=strategy, draft=draft), plain, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_prompt_as_long_as_the_context_is_refused():
    with pytest.raises(ValueError, match=re.escape(f"has {CONTEXT} tokens, and the model's context of {CONTEXT}")):
        decodax.generate(SHORT, prompts(37, CONTEXT), max_new_tokens=1)
