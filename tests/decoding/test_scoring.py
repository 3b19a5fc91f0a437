"""Scores are the log-softmax of the logits, in float64, whatever the batch, the chunks and the kind of the model."""

import dataclasses
import doctest
import inspect
import re
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax.decoding import scoring
from decodax.decoding import token_scores as chunks
from decodax.decoding.scoring import Perplexity, Score, perplexity
from decodax.models.load import LanguageModel
from tests import model_kinds
from tests.golden_files import load_golden
from tests.tiny import tiny_model

# float32 logits of at most 20: an exp-sum of V of them and a difference, each rounded to 1e-6 of that, and the layers'.
TOLERANCE = 1e-5
CONTEXT = 512
MODEL, PARAMS = tiny_model(max_position_embeddings=CONTEXT)
LM = LanguageModel(MODEL, MODEL.config, PARAMS, None, Path("tiny"), ())
RANDOM = np.random.default_rng(3)
# Tokens of a row, and how many of them are its prompt: chunks of 16 end before, within and after continuations.
SIZES = ((7, 3), (41, 29), (23, 1), (17, 16), (18, 17), (3, 2), (33, 5))
ROWS = [RANDOM.integers(0, 13, size) for size, _ in SIZES]
PROMPTS = [row[:first] for row, (_, first) in zip(ROWS, SIZES, strict=True)]
CONTINUATIONS = [row[first:] for row, (_, first) in zip(ROWS, SIZES, strict=True)]


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def expected(logits, row, first):
    """log-probabilities of row[first:], and whether each has the largest logit, from the logits after every token."""
    of_all = log_softmax(logits)
    places = np.arange(first, len(row))
    return of_all[places - 1, row[places]], of_all[places - 1].argmax(-1) == row[places]


def check(scores, logits_of, rows=ROWS, firsts=tuple(first for _, first in SIZES), tolerance=TOLERANCE):
    for score, row, first in zip(scores, rows, firsts, strict=True):
        logprobs, is_argmax = expected(logits_of(row), row, first)
        np.testing.assert_allclose(score.token_logprobs, logprobs, atol=tolerance, rtol=0)
        assert score.logprob == pytest.approx(logprobs.sum(), abs=tolerance * len(logprobs))
        assert score.num_tokens == len(row) - first == len(score.token_logprobs)
        assert score.is_greedy == is_argmax.all()


def score(lm=LM, prompts=PROMPTS, continuations=CONTINUATIONS, **options):
    return decodax.score(lm, prompts, continuations, **{"per_token": True, **options})


def model_of(kind):
    model = model_kinds.model_of(kind)
    return LanguageModel(model, model.config, model_kinds.params_of(kind), None, Path(kind), ())


def logits_at_once(lm):
    """Logits after every token of a row, without a cache; rows are padded to one length, which causal layers ignore."""

    @jax.jit
    def run(params, tokens, row_length):
        position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return lm.model.logits(params, lm.model.apply(params, tokens, position, row_length=row_length).hidden)

    def logits_of(row):
        padded = np.zeros((1, 48), np.int32)
        padded[0, : len(row)] = row
        return run(lm.params, padded, np.full((1, 1), len(row), np.int32))[0, : len(row)]

    return logits_of


@pytest.mark.parametrize("kind", model_kinds.LAYERS)
@pytest.mark.quick_cases(3)
def test_every_kind_of_model_in_chunks(kind, monkeypatch):
    monkeypatch.setattr(chunks, "MAX_CHUNK_TOKENS", 16)
    lm = model_of(kind)
    check(score(lm, batch_size=4), logits_at_once(lm))


@pytest.mark.parametrize("case", ["llama", "phi3_longrope"])
def test_logits_of_transformers(case):
    """With longrope the angles of all tokens depend on the length of the row."""
    golden = load_golden(case)
    lm, rows = decodax.load(golden.folder), list(zip(golden.tokens, golden.length, golden.logits, strict=True))
    rows = [(tokens[:length], logits[:length]) for tokens, length, logits in rows if length > 1]
    found = score(lm, [tokens[:1] for tokens, _ in rows], [tokens[1:] for tokens, _ in rows])
    of_row = {tokens.tobytes(): logits for tokens, logits in rows}
    check(found, lambda row: of_row[row.tobytes()], [tokens for tokens, _ in rows], [1] * len(rows), tolerance=1e-4)


@cache
def plain():
    return score()


def test_one_chunk():
    check(plain(), logits_at_once(LM))


def test_the_embedded_model():
    lm = decodax.load()
    texts = [("def area(width, height):\n    return width", " * height"), ("for i in", " range(10):\n        print(")]
    found = score(lm, *zip(*texts, strict=True))
    rows = [lm.tokenizer.encode(prompt + continuation) for prompt, continuation in texts]
    firsts = [len(lm.tokenizer.encode(prompt)) for prompt, _ in texts]
    logits_of = lambda row: decodax.logits(lm, row[None])[0]
    check(found, logits_of, [np.array(row) for row in rows], firsts, tolerance=3e-5)  # eight layers round more


def test_batches_of_any_size_and_rows_alone_are_alike():
    for batch_size in (1, 3, 7):
        for one, other in zip(score(batch_size=batch_size), plain(), strict=True):
            np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, atol=TOLERANCE, rtol=0)
            assert (one.num_tokens, one.is_greedy) == (other.num_tokens, other.is_greedy)


def test_chunks_and_blocks_of_logits_change_nothing(monkeypatch):
    texts = [RANDOM.integers(0, 37, size) for size in (211, 190)]
    rows = {"prompts": [text[:5] for text in texts], "continuations": [text[5:] for text in texts]}
    whole = score(**rows)
    for chunk, positions in ((16, 512), (64, 4), (112, 7), (512, 1)):
        monkeypatch.setattr(chunks, "MAX_CHUNK_TOKENS", chunk)
        monkeypatch.setattr(chunks, "LOGITS_BYTES", 4 * 2 * 37 * positions)
        for one, other, num_tokens in zip(score(**rows), whole, (206, 185), strict=True):
            np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, atol=TOLERANCE, rtol=0)
            assert one.num_tokens == num_tokens


def test_what_generate_writes_is_greedy_and_nothing_else():
    prompts = [[3, 1, 4], [15, 9, 26, 5, 35], [8]]
    out = decodax.generate(LM, prompts, max_new_tokens=13, stop_token_ids=[])
    written = [row.tolist() for row in out.tokens]
    found = score(prompts=prompts, continuations=written)
    assert [row.is_greedy for row in found] == [True, True, True]
    for row, logprobs in zip(found, out.logprobs, strict=True):
        np.testing.assert_allclose(row.token_logprobs, logprobs, atol=TOLERANCE, rtol=0)
    for place in (0, 6, 12):  # one other token, the least probable or not, ends it
        changed = [[*row[:place], (row[place] + 1) % 37, *row[place + 1 :]] for row in written]
        assert [row.is_greedy for row in score(prompts=prompts, continuations=changed)] == [False] * 3


def test_a_score_sums_its_tokens():
    for row in plain():
        assert row.logprob == pytest.approx(float(np.sum(row.token_logprobs, dtype=np.float64)), abs=1e-12)
    assert score(per_token=False)[1] == dataclasses.replace(plain()[1], token_logprobs=None)
    assert isinstance(plain()[0], Score) and plain()[0].token_logprobs.dtype == np.float32


def test_numbers_that_are_not_finite_stay_in_their_row(monkeypatch):
    monkeypatch.setattr(chunks, "MAX_CHUNK_TOKENS", 16)
    broken = dataclasses.replace(LM, params=PARAMS | {"embedding": PARAMS["embedding"].at[36].set(jnp.nan)})
    # The argmax of NaN is the last token, 36, which is no reason to call it greedy.
    prompts = [[36, *range(30)], [36], [*range(31)], [5] * 20]
    continuations = [[3, 4], [36, 36], [3, 4], [3, 36]]
    found, whole = score(broken, prompts, continuations), score(LM, prompts, continuations)
    for row in (0, 1):
        assert np.isnan(found[row].token_logprobs).all() and np.isnan(found[row].logprob) and not found[row].is_greedy
    for row in (2, 3):  # the last token is not run
        np.testing.assert_allclose(found[row].token_logprobs, whole[row].token_logprobs, atol=TOLERANCE, rtol=0)


def by_definition(ids, context, stride):
    """The mean over tokens 1 .. T - 1: each after all that precede it in the first window that holds it."""
    logits_of, total = logits_at_once(LM), 0.0
    for place in range(1, len(ids)):
        begin = next(begin for begin in range(0, len(ids), stride) if begin + context > place)
        total += log_softmax(logits_of(ids[begin:place]))[-1, ids[place]]
    return -total / (len(ids) - 1)


@pytest.mark.parametrize(
    ("num_tokens", "context", "stride"), [(31, 7, 1), (31, 7, 6), (31, 11, 4), (31, 31, 15), (31, 40, 20), (2, 7, 3)]
)
def test_perplexity_is_its_definition(num_tokens, context, stride):
    ids = RANDOM.integers(0, 37, num_tokens)
    seen = []
    found = perplexity(LM, ids, context, stride, batch_size=3, on_tokens=seen.append)
    want = by_definition(ids, context, stride)
    assert found.negative_log_likelihood == pytest.approx(want, abs=TOLERANCE)
    assert found.perplexity == pytest.approx(np.exp(want), rel=TOLERANCE)
    assert (found.num_tokens, found.context, found.stride) == (num_tokens - 1, context, stride)
    assert seen[-1] == num_tokens - 1 and seen == sorted(set(seen))


def test_with_a_stride_of_one_every_token_has_the_full_context():
    ids, context = RANDOM.integers(0, 37, 23), 5
    logits_of = logits_at_once(LM)
    want = [log_softmax(logits_of(ids[max(0, t - context + 1) : t]))[-1, ids[t]] for t in range(1, len(ids))]
    assert perplexity(LM, ids, context, 1).negative_log_likelihood == pytest.approx(-np.mean(want), abs=TOLERANCE)


def test_perplexity_has_defaults_and_an_end():
    ids = RANDOM.integers(0, 37, 5).tolist()
    found = perplexity(LM, ids)
    assert (found.num_tokens, found.context, found.stride) == (4, CONTEXT, CONTEXT // 2)
    assert Perplexity(1, 1e4, 2, 1).perplexity == np.inf
    assert doctest.testmod(scoring).failed == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "context must be a whole number, at least 2, got 1"),
        ({"context": 513}, r"context must be at most 512 \(tokens of the model's context\), got 513"),
        ({"context": 9, "stride": 9}, r"stride must be in 1\.\.8 \(less than the context of 9.*, got 9"),
        ({"stride": 0}, "stride must be a whole number, at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number, at least 1, got 0"),
        ({"tokens": [3]}, "tokens must be at least 2, as the first one is not scored, got 1"),
        ({"tokens": [3, 37]}, r"tokens must be token ids in 0\.\.36 \(the vocabulary\), got 37"),
        ({"tokens": "text"}, "tokens must be a list of token ids"),
    ],
)
def test_perplexity_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(perplexity)(LM, **{"tokens": [1, 2, 3], **options})


def test_perplexity_of_numbers_that_are_not_finite_is_an_error():
    broken = dataclasses.replace(LM, params=PARAMS | {"embedding": PARAMS["embedding"] * jnp.nan})
    with pytest.raises(ArithmeticError, match="became NaN or infinite"):
        perplexity(broken, [1, 2, 3], 16, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lm": PARAMS}, "lm must be a model as decodax.load gives it"),
        ({"per_token": 1}, "per_token must be True or False, got 1"),
        ({"batch_size": 0}, "batch_size must be a whole number, at least 1, got 0"),
        ({"continuations": [[1]]}, "continuations must be one for each prompt, got 1 continuations and 7 prompts"),
        (
            {"prompts": [[1], [2] * 500], "continuations": [[1], [3] * 13]},
            r"must fit in the model's context of 512, got 500 \+ 13 tokens in prompt 1: shorten them",
        ),
        ({"prompts": [[1], "text"], "continuations": [[1], [1]]}, "tiny has no tokenizer.json: pass token ids"),
        ({"prompts": [[37]], "continuations": [[1]]}, r"prompt 0: token ids must be in 0\.\.36"),
    ],
)
def test_score_refuses_what_cannot_be(arguments, message):
    given = {"lm": LM, "prompts": PROMPTS, "continuations": CONTINUATIONS, **arguments}
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(decodax.score)(**given)


def test_the_last_token_may_end_the_context_and_none_is_not_given():
    (row,) = score(prompts=[[2] * 500], continuations=[[3] * 12], per_token=None, batch_size=None)
    assert row.num_tokens == 12 and row.token_logprobs is None


def largest_logits(program, vocabulary):
    """Elements of a program's largest array with an axis of the vocabulary, but none of 23, the width of the model."""
    shapes = {tuple(map(int, re.findall(r"\d+", found))) for found in re.findall(r"f32\[([\d,]+)\]", program)}
    return max(np.prod(shape) for shape in shapes if vocabulary in shape and 23 not in shape)


@pytest.mark.parametrize(("num_tokens", "batch", "vocabulary"), [(2048, 1, 4096), (2048, 8, 32_771)])
def test_no_logits_of_the_whole_text_are_made(num_tokens, batch, vocabulary):
    model, _ = tiny_model(max_position_embeddings=num_tokens, vocab_size=vocabulary)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    state = jax.eval_shape(lambda: chunks.empty_scoring_state(model, batch, num_tokens, jnp.float32))
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    block = chunks.block_tokens(model, batch, chunks.MAX_CHUNK_TOKENS)
    rows = integers(batch, num_tokens), integers(batch), integers(batch), integers()
    compiled = chunks.score_chunk.lower(model, chunks.MAX_CHUNK_TOKENS, block, params, state, *rows).compile()
    assert largest_logits(compiled.as_text(), vocabulary) == batch * block * vocabulary <= chunks.LOGITS_BYTES // 4
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * batch * num_tokens * vocabulary
