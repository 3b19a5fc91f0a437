"""`decodax.generate` from prompts to text: options, stops, streaming, reasons, and clear errors for bad input."""

import dataclasses
import inspect
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import decodax
from decodax.models.load import LanguageModel
from decodax.models.tokenizer import Tokenizer
from tests.tiny import tiny_model

MODEL, PARAMS = tiny_model()
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 "


def letter_tokenizer():
    """One token per letter, written together without spaces."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend)


LM = LanguageModel(MODEL, MODEL.config, PARAMS, letter_tokenizer(), Path("tiny"), ())
PROMPTS = ["abc", "the quick brown fox", "x"]


def ids(text):
    return [LETTERS.index(letter) for letter in text]


def generate(prompts=PROMPTS, **options):
    return decodax.generate(LM, prompts, **{"max_new_tokens": 12, **options})


@pytest.fixture(scope="module")
def plain():
    return generate()


def test_text_and_ids_one_and_many(plain):
    assert [len(tokens) for tokens in plain.tokens] == [12] * 3 and plain.finish_reasons == ["length"] * 3
    for prompts in ([ids(p) for p in PROMPTS], [np.array(ids(PROMPTS[0])), *PROMPTS[1:]]):
        np.testing.assert_array_equal(generate(prompts).tokens, plain.tokens)
    for one in (PROMPTS[0], ids(PROMPTS[0]), np.array([ids(PROMPTS[0])])):
        result = generate(one)
        np.testing.assert_array_equal(result.tokens, plain.tokens[:1])
        assert result.text == plain.text[:1] == ["".join(LETTERS[t] for t in plain.tokens[0])]


def test_options_as_programs_pass_them(plain):
    """None for what is not given; NumPy's and JAX's numbers and arrays; tuples."""
    nothing = dict.fromkeys(field.name for field in dataclasses.fields(decodax.decoding.GenerateOptions))
    for options in (
        nothing | {"max_new_tokens": np.int64(12)},
        {"max_new_tokens": jnp.int32(12), "stop": (), "stop_token_ids": np.array([], int), "temperature": np.zeros(3)},
        {"temperature": (None, 0.0, jnp.float32(0)), "seed": jnp.arange(3), "min_new_tokens": jnp.array(0)},
    ):
        np.testing.assert_array_equal(generate(**options).tokens, plain.tokens)


def test_stats_count(plain):
    stats = plain.stats
    assert (stats.num_prompt_tokens, stats.num_new_tokens) == (3 + 19 + 1, 36)
    assert (stats.prefill_forwards, stats.target_forwards) == (1, 12)
    assert stats.tokens_per_second == pytest.approx(36 / stats.decode_seconds)


def test_stop_token_is_kept_and_ends_the_row(plain):
    stop = int(plain.tokens[1][4])
    end = list(plain.tokens[1]).index(stop) + 1
    own = dataclasses.replace(LM, end_token_ids=(stop,))
    for result in (generate(stop_token_ids=[stop]), decodax.generate(own, PROMPTS, max_new_tokens=12)):
        np.testing.assert_array_equal(result.tokens[1], plain.tokens[1][:end])
        assert result.finish_reasons[1] == "stop"
    unstopped = decodax.generate(own, PROMPTS, max_new_tokens=12, stop_token_ids=[])
    np.testing.assert_array_equal(unstopped.tokens, plain.tokens)


@pytest.mark.parametrize("block_tokens", [1, 5])
def test_stop_string_across_tokens_and_blocks(plain, block_tokens):
    text = plain.text[0]
    stop = text[4:6]
    end = text.index(stop)
    pieces = {0: "", 1: "", 2: ""}

    def collect(row, piece):
        pieces[row] += piece

    result = generate(stop=["never seen", stop], block_tokens=block_tokens, on_text=collect)
    assert result.text[0] == text[:end] and result.finish_reasons[0] == "stop"
    np.testing.assert_array_equal(result.tokens[0], plain.tokens[0][: end + len(stop)])
    assert len(result.logprobs[0]) == len(result.tokens[0])
    assert list(pieces.values()) == result.text


def test_minimum_length(plain):
    stop = int(plain.tokens[0][1])
    result = generate(stop_token_ids=[stop], min_new_tokens=6)
    assert stop not in result.tokens[0][:6] and len(result.tokens[0]) >= 6


def test_seeds_belong_to_rows():
    options = {"temperature": 1.0, "seed": [3, 1, 2]}
    together = generate(**options)
    for row, seed in enumerate(options["seed"]):
        alone = generate(PROMPTS[row], temperature=1.0, seed=seed)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[row], atol=2e-5)
    other = generate(temperature=1.0, seed=[4, 5, 6])
    assert any(list(a) != list(b) for a, b in zip(other.tokens, together.tokens, strict=True))
    same = generate(["abc", "abc"], temperature=1.0, seed=7)
    np.testing.assert_array_equal(*same.tokens)


def test_penalties_see_prompt_and_output(plain):
    banned = generate(logit_bias={int(plain.tokens[0][0]): -np.inf})
    assert int(plain.tokens[0][0]) not in banned.tokens[0]
    result = generate(frequency_penalty=1e6)
    assert all(len(set(tokens.tolist())) == 12 for tokens in result.tokens)
    result = generate(repetition_penalty=1e6, logit_bias=dict.fromkeys(range(37), 100.0))
    for prompt, tokens in zip(PROMPTS, result.tokens, strict=True):
        assert not set(ids(prompt)) & set(tokens[:5].tolist())


def test_context_limits_the_output():
    model, params = tiny_model(max_position_embeddings=20)
    short = LanguageModel(model, model.config, params, LM.tokenizer, Path("tiny"), ())
    result = decodax.generate(short, PROMPTS, max_new_tokens=12)
    assert [len(tokens) for tokens in result.tokens] == [12, 1, 12] and result.finish_reasons == ["length"] * 3
    for huge in (2**40, 10**400):
        result = decodax.generate(short, PROMPTS, max_new_tokens=huge, min_new_tokens=2**40, stop_token_ids=0)
        assert [len(tokens) for tokens in result.tokens] == [17, 1, 19] and result.finish_reasons == ["length"] * 3


def test_strategy_by_name_and_by_object(plain):
    for strategy in ("autoregressive", decodax.decoding.autoregressive):
        np.testing.assert_array_equal(generate(strategy=strategy).tokens, plain.tokens)


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ("", {}, ValueError, "prompt 0 is empty"),
        ([], {}, ValueError, "at least one prompt, got none"),
        (["abc", []], {}, ValueError, "prompt 1 is empty"),
        ([[1, 99]], {}, ValueError, r"token ids must be in 0\.\.36 \(the vocabulary\), got 99"),
        ([[1, -1]], {}, ValueError, "got -1"),
        ([[0.5]], {}, ValueError, r"prompt 0 must be a text or a list of token ids, got \[0\.5\]"),
        ([[0] * 512], {}, ValueError, "prompt 0 has 512 tokens, .* context of 512 leaves room for at most 511"),
        ("abc", {"temperature": -0.1}, ValueError, "temperature must be"),
        ("abc", {"temprature": 0.5}, TypeError, "no option 'temprature': did you mean 'temperature'"),
        (
            "abc",
            {"max_new_tokens": 0},
            ValueError,
            "max_new_tokens must be a whole number, at least 1, got 0",
        ),
        ("abc", {"stop": ["a", ""]}, ValueError, "stop must be one or more non-empty strings"),
        ("abc", {"seed": [1, 2]}, ValueError, r"seed must be a whole number, or one per prompt \(1\)"),
        ("abc", {"seed": np.array([0.5])}, ValueError, "seed must be a whole number"),
        ("abc", {"stop_token_ids": 37}, ValueError, r"stop_token_ids must be token ids in 0\.\.36 \(the vocabulary\)"),
        ("abc", {"stop_token_ids": [-1], "min_new_tokens": 3}, ValueError, "stop_token_ids must be .*, got -1"),
    ],
)
def test_bad_input(prompts, options, error, message):
    with pytest.raises(error, match=message):
        generate(prompts, **options)


def test_text_needs_a_tokenizer():
    bare = LanguageModel(MODEL, MODEL.config, PARAMS, None, Path("tiny"), ())
    assert decodax.generate(bare, [1, 2], max_new_tokens=3).text is None
    with pytest.raises(ValueError, match=r"has no tokenizer\.json: pass token ids"):
        decodax.generate(bare, "abc")
    with pytest.raises(ValueError, match="use stop_token_ids"):
        decodax.generate(bare, [1, 2], stop="x")


def test_options_that_only_shape_a_draw_warn_when_greedy():
    with pytest.warns(UserWarning, match="top_p changes nothing at temperature 0"):
        generate("abc", top_p=0.5)


def test_logits_of_whole_rows(plain):
    rows = np.array([ids(PROMPTS[0]) + plain.tokens[0].tolist()])
    logits = np.asarray(decodax.logits(LM, rows), np.float64)
    assert logits.shape == (1, 15, 37)
    np.testing.assert_array_equal(logits[0, 2:-1].argmax(-1), plain.tokens[0])
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprobs[0, 2:-1].max(-1), plain.logprobs[0], atol=2e-5)
    logits = inspect.unwrap(decodax.logits)  # as users have it: without this session's check of shapes before its own
    np.testing.assert_array_equal(logits(LM, rows.tolist()), logits(LM, rows))
    for bad, message in (
        ([1, 2], "shape"),
        ([[99]], r"0\.\.36, got 99"),
        ([[0] * 513], "context is 512"),
        ([[1, 2], [3]], r"tokens must be whole numbers of shape \[B, T\], got \[\[1, 2\], \[3\]\]"),
        ([[0.5]], "tokens must be whole numbers"),
        ([[True]], "tokens must be whole numbers"),
        ([["a"]], "tokens must be whole numbers"),
        (None, "tokens must be whole numbers"),
        ([[10**30]], "tokens must be whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            logits(LM, bad)
    for bad in (None, "abc", LM.model):
        for function in (logits, inspect.unwrap(decodax.generate)):
            with pytest.raises(ValueError, match=r"lm must be a model as decodax\.load gives it, got"):
                function(bad, rows)
