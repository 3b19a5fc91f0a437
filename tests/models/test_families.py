"""Every family gives the logits of transformers for tiny random models, by every route."""

import json
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax.models.families as package
from decodax.models.families import FAMILIES
from decodax.models.load import load
from decodax.models.model import commit
from tests.golden_files import golden_cases, load_golden

# The project's promise. float32 sums over at most 48 terms in three layers differ by some 1e-6 of logits up to 13.
GOLDEN_TOLERANCE = 2e-4
ROUTE_TOLERANCE = 1e-5  # of the largest logit: the same additions, in blocks of other sizes

# One case for each thing that could depend on the route: row length (dynamic, longrope), windows, norms, soft-caps.
ROUTE_CASES = [
    *("llama_dynamic", "llama_longrope", "mistral", "qwen3_window", "gemma2"),
    *("mixtral_window", "deepseek_v3", "gpt_oss", "minimax", "qwen3_next"),
]


@lru_cache(maxsize=1)  # parametrised tests run case by case
def language_model(name):
    return load(load_golden(name).folder, dtype="float32")


@partial(jax.jit, static_argnums=0)
def step(model, params, caches, tokens, start, row_length, count):
    """T tokens per row from position `start[b]` on, keeping the first `count[b]`: logits [B, T, V] and caches."""
    position = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    forward = model.apply(params, tokens, position, caches, row_length=row_length)
    return model.logits(params, forward.hidden), commit(caches, forward.cache_updates, count)


def prefill(lm, tokens, length, chunk):
    """Logits [B, T, V] of whole prompts, run `chunk` tokens at a time, and the caches afterwards."""
    batch, width = tokens.shape
    caches = lm.model.empty_cache(batch, 64, jnp.float32)
    padded = np.pad(tokens, ((0, 0), (0, -width % chunk)))
    logits = []
    for start in range(0, width, chunk):
        piece = jnp.asarray(padded[:, start : start + chunk])
        count = jnp.asarray(np.clip(length - start, 0, chunk), jnp.int32)
        position = jnp.full(batch, start, jnp.int32)
        piece, caches = step(lm.model, lm.params, caches, piece, position, jnp.asarray(length)[:, None], count)
        logits.append(np.asarray(piece))
    return np.concatenate(logits, axis=1)[:, :width], caches


def prompts_only(logits, length):
    """The logits of prompt tokens only, row by row: [sum of lengths, V]."""
    return np.concatenate([row[:count] for row, count in zip(logits, length, strict=True)])


def test_catalogue_lists_the_folder():
    files = {path.stem for path in Path(package.__file__).parent.glob("*.py")}
    assert set(FAMILIES) == {name for name in files if not name.startswith("_")} - {"contract", "layer"}
    assert all(family.model_type == name for name, family in FAMILIES.items())


def test_every_family_has_a_golden_case():
    configs = (json.loads((load_golden(name).folder / "config.json").read_text()) for name in golden_cases())
    assert set(FAMILIES) == {config["model_type"] for config in configs}


@pytest.mark.parametrize("name", golden_cases())
@pytest.mark.quick_cases(15)
def test_logits_of_a_ragged_batch(name):
    golden, lm = load_golden(name), language_model(name)
    logits, _ = prefill(lm, golden.tokens, golden.length, golden.tokens.shape[1])
    expected = prompts_only(golden.logits, golden.length)
    np.testing.assert_allclose(prompts_only(logits, golden.length), expected, rtol=0, atol=GOLDEN_TOLERANCE)


@pytest.mark.parametrize("name", ROUTE_CASES)
@pytest.mark.quick_cases(1)
def test_prefill_at_once_in_chunks_and_token_by_token_are_equal(name):
    golden, lm = load_golden(name), language_model(name)
    whole, _ = prefill(lm, golden.tokens, golden.length, golden.tokens.shape[1])
    limit = ROUTE_TOLERANCE * np.abs(whole).max()
    for chunk in (7, 1):
        pieces, caches = prefill(lm, golden.tokens, golden.length, chunk)
        expected, got = (prompts_only(logits, golden.length) for logits in (whole, pieces))
        np.testing.assert_allclose(got, expected, rtol=0, atol=limit)
        np.testing.assert_array_equal(caches[0].length, golden.length)


@pytest.mark.parametrize("name", ROUTE_CASES)
@pytest.mark.quick_cases(1)
def test_a_row_in_a_batch_is_the_row_alone(name):
    golden, lm = load_golden(name), language_model(name)
    together, _ = prefill(lm, golden.tokens, golden.length, golden.tokens.shape[1])
    limit = ROUTE_TOLERANCE * np.abs(together).max()
    for row, count in enumerate(golden.length):
        alone, _ = prefill(lm, golden.tokens[row : row + 1], golden.length[row : row + 1], golden.tokens.shape[1])
        np.testing.assert_allclose(alone[0, :count], together[row, :count], rtol=0, atol=limit)


@pytest.mark.slow
def test_eager_is_jitted():
    golden, lm = load_golden("llama"), language_model("llama")
    row, count = golden.tokens[:1], golden.length[:1]
    with jax.disable_jit():
        logits, _ = prefill(lm, row[:, : count[0]], count, int(count[0]))
    np.testing.assert_allclose(logits[0], golden.logits[0, : count[0]], rtol=0, atol=GOLDEN_TOLERANCE)
