"""`load` and `generate` give the greedy tokens of transformers, for every family and rope scaling."""

from dataclasses import replace

import numpy as np
import pytest

import decodax
from tests.golden_files import golden_cases, load_golden


def load(golden):
    """The model of a golden case, with room for its rows: those of dynamic scaling are longer than its context."""
    lm = decodax.load(golden.folder)
    config = replace(lm.config, max_position_embeddings=64)
    return replace(lm, config=config, model=replace(lm.model, config=config))


@pytest.mark.parametrize("name", golden_cases())
@pytest.mark.quick_cases(7)
def test_same_tokens_as_transformers(name):
    golden = load_golden(name)
    lm = load(golden)
    prompts = [row[:length] for row, length in zip(golden.tokens, golden.length, strict=True)]
    new = golden.generated.shape[1]
    result = decodax.generate(lm, prompts, max_new_tokens=new, stop_token_ids=[])
    np.testing.assert_array_equal(result.tokens, golden.generated)


def test_same_logits_as_transformers():
    golden = load_golden("llama")
    prompt = golden.tokens[:1, : golden.length[0]]
    logits = decodax.logits(load(golden), prompt)
    np.testing.assert_allclose(logits[0], golden.logits[0, : prompt.shape[1]], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["llama_dynamic", "llama_longrope", "mistral"])
@pytest.mark.quick_cases(1)
def test_row_alone_in_chunks(name, monkeypatch):
    """Scalings that depend on the row's length, and windows, do not depend on how the prompt was cut."""
    monkeypatch.setattr("decodax.decoding.chunked_prefill.MAX_CHUNK_TOKENS", 5)
    golden = load_golden(name)
    lm = load(golden)
    for row, length, want in zip(golden.tokens, golden.length, golden.generated, strict=True):
        result = decodax.generate(lm, row[:length], max_new_tokens=len(want), stop_token_ids=[])
        np.testing.assert_array_equal(result.tokens[0], want)
