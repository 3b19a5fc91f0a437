"""`decodax.generate` goes from prompts to text: options, stops, streaming, finish reasons, errors for bad input."""

import dataclasses
import inspect
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import decodax
from decodax.decoding import generation, pace
from decodax.models.load import LanguageModel
from decodax.models.tokenizers.tokenizer import Tokenizer
from tests.tiny import tiny_model

MODEL, PARAMS = tiny_model()
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 "


def letter_tokenizer():
    """One token per letter, decoded without spaces."""
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


def test_tokens_after_a_stop_string_are_not_counted_as_new(plain):
    result = generate(stop=[plain.text[0][:1]], block_tokens=8, strategy="prompt_lookup")
    stats = result.stats
    assert len(result.tokens[0]) == 1 and stats.num_new_tokens == sum(map(len, result.tokens))
    assert stats.num_cut_tokens > 5 and stats.tokens_per_second == stats.num_new_tokens / stats.decode_seconds
    decoded = sum((n + 1) * times for n, times in enumerate(stats.accepted_lengths))
    assert stats.num_new_tokens + stats.num_cut_tokens == decoded
    assert stats.tokens_per_forward == decoded / sum(stats.accepted_lengths)


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


@pytest.mark.parametrize("strategy", [None, "prompt_lookup"])
def test_stop_string_with_a_special_token(plain, strategy):
    """The special token is not in the text, in a batch, streamed, and with several tokens in a round."""
    token = int(plain.tokens[1][4])
    backend = letter_tokenizer().backend
    backend.add_special_tokens([LETTERS[token]])
    lm = dataclasses.replace(LM, tokenizer=Tokenizer(backend))
    end = plain.tokens[1].tolist().index(token) + 1
    stop = plain.text[1][end - 2 : end] if end > 1 else LETTERS[token]
    pieces = ["", "", ""]

    def collect(row, piece):
        pieces[row] += piece

    for stops in (LETTERS[token], ["never", stop]):
        result = decodax.generate(
            lm, PROMPTS, max_new_tokens=12, stop=stops, strategy=strategy, on_text=collect, block_tokens=5
        )
        assert result.tokens[1].tolist() == plain.tokens[1][:end].tolist() and result.finish_reasons[1] == "stop"
        hidden = len(stop) - 1 if stops != LETTERS[token] else 0
        assert result.text[1] == plain.text[1][: end - 1 - hidden] and pieces == result.text
        assert len(result.logprobs[1]) == end
        pieces[:] = ["", "", ""]


def byte_tokenizer():
    """Bytes of some characters in no order, and a few words: the model writes valid characters and invalid bytes."""
    values = list(dict.fromkeys("한글😀éคद".encode()))
    words = [*(f"<0x{value:02X}>" for value in values), "▁a", "▁", "s", "</s>"]
    words += [f"<0x{value:02X}>" for value in range(97, 97 + 37 - len(words))]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}))
    decoders = tokenizers.decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)  # pyright: ignore[reportArgumentType]
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend)


@pytest.mark.parametrize("strategy", [None, "prompt_lookup"])
def test_text_is_what_the_tokens_add_to_a_byte_level_prompt(strategy):
    tokenizer = byte_tokenizer()
    lm = dataclasses.replace(LM, tokenizer=tokenizer)
    words = tokenizer.backend.get_vocab()
    for texts in (("한" * 5 + "😀", "😀" * 4, "éé"), ("éé글한글한글", "éé😀", "द"), ("한द한द한😀", "ค😀", "😀é")):
        prompts = [[words[f"<0x{value:02X}>"] for value in text.encode()] for text in texts]
        prompts[2] = prompts[2][:-1]  # ends inside a character
        pieces = ["", "", ""]

        def collect(row, piece, pieces=pieces):
            pieces[row] += piece

        result = decodax.generate(lm, prompts, max_new_tokens=12, strategy=strategy, on_text=collect, block_tokens=5)
        for prompt, tokens, text in zip(prompts, result.tokens, result.text, strict=True):
            before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + tokens.tolist())
            common = next(i for i, (a, b) in enumerate(zip(before + "\0", whole + "\1", strict=False)) if a != b)
            assert text == whole[common:]
        assert pieces == result.text


def test_a_prompt_token_outside_the_model_s_vocabulary_is_refused():
    backend = letter_tokenizer().backend
    backend.add_special_tokens(["<|im_start|>"])  # 37, and the model's vocabulary ends at 36
    lm = dataclasses.replace(LM, tokenizer=Tokenizer(backend))
    with pytest.raises(ValueError, match=r"prompt 1 holds '<\|im_start\|>', which is token 37 in .* ends at 36"):
        decodax.generate(lm, ["a", "a<|im_start|>b"])


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


def test_one_seed_gives_every_row_its_own():
    together = generate(["abc"] * 40, temperature=1.0, seed=7)
    assert together.seeds[0] == 7 and len(set(together.seeds)) == 40
    assert len({tuple(tokens) for tokens in together.tokens}) == 40
    fewer = generate(["x", "abc"], temperature=1.0, seed=7)
    assert fewer.seeds == together.seeds[:2]
    for row in (0, 1, 39):
        alone = generate("abc", temperature=1.0, seed=together.seeds[row : row + 1])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
    # The values are part of what a seed means.
    assert together.seeds[:3] == [7, 75971499, 1685402102] and generate(PROMPTS[:2], seed=(None, 5)).seeds == [0, 5]


@pytest.mark.parametrize("strategy", [None, "prompt_lookup"])
def test_samples_of_a_prompt_are_the_prompt_given_with_their_seeds(strategy):
    options = {"temperature": [0.7, 1.3, 1.0], "strategy": strategy, "stop": "z"}
    result = generate(n=3, seed=5, **options)
    assert [len(found) for found in (result.tokens, result.text, result.seeds, result.finish_reasons)] == [9] * 4
    assert len(set(result.seeds)) == 9 and result.seeds[::3] == generate(seed=5, **options).seeds
    assert result.stats.num_prompt_tokens == 3 + 19 + 1 and result.stats.prefill_forwards == 1
    assert len({tuple(tokens) for tokens in result.tokens[:3]}) == 3
    for sample in range(3):
        again = generate(seed=result.seeds[sample::3], **options)
        for prompt in range(3):
            np.testing.assert_array_equal(again.tokens[prompt], result.tokens[3 * prompt + sample])
            assert again.text[prompt] == result.text[3 * prompt + sample]


def test_streamed_samples_are_named_by_row():
    pieces = [""] * 4
    result = generate(
        ["abc", "x"], n=2, temperature=1.0, on_text=lambda row, piece: pieces.__setitem__(row, pieces[row] + piece)
    )
    assert pieces == result.text
    with pytest.warns(UserWarning, match="n changes nothing at temperature 0"):
        generate("abc", n=2)


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
        result = decodax.generate(short, PROMPTS, max_new_tokens=huge, min_new_tokens=2**40, stop_token_ids=[0])
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
        ([[0.5]], {}, ValueError, r"prompt 0 must be .* a list of token ids or a list of messages, got \[0\.5\]"),
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
        (
            "abc",
            {"stop_token_ids": [37]},
            ValueError,
            r"stop_token_ids must be token ids in 0\.\.36 \(the vocabulary\)",
        ),
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


def test_an_unsupported_tokenizer_file_is_named(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"")
    bare = LanguageModel(MODEL, MODEL.config, PARAMS, None, tmp_path, ())
    for prompt, options in (("abc", {}), ([1, 2], {"stop": "x"})):
        with pytest.raises(ValueError, match=r"no tokenizer\.json, only vocab\.txt, .*AutoTokenizer"):
            decodax.generate(bare, prompt, **options)


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
    logits = inspect.unwrap(decodax.logits)  # as for users: without this session's shape checks
    np.testing.assert_array_equal(logits(LM, rows.tolist()), logits(LM, rows))
    for bad, message in (
        ([1, 2], "shape"),
        ([[99]], r"0\.\.36, got 99"),
        ([[0] * 513], "at most 512 tokens"),
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


class Calls:
    """The calls of the compiled loop: how many tokens each may write."""

    def __init__(self, monkeypatch, seconds):
        self.tokens = []
        monkeypatch.setattr(pace, "CALL_SECONDS", seconds)
        decode = generation.ReadyStrategy.decode

        def counting(plan, state, max_tokens):
            self.tokens.append(int(max_tokens))
            return decode(plan, state, max_tokens)

        monkeypatch.setattr(generation.ReadyStrategy, "decode", counting)


@pytest.mark.parametrize("options", [{}, {"strategy": "prompt_lookup", "draft_tokens": 3}])
def test_where_the_loop_is_cut_changes_nothing(options, monkeypatch):
    calls = Calls(monkeypatch, 1e6)
    whole = generate(**options)
    assert len(calls.tokens) == 1
    monkeypatch.setattr(pace, "CALL_SECONDS", 0.0)
    cut = generate(**options)
    assert len(calls.tokens) > 4 and set(calls.tokens[1:]) == {1}
    np.testing.assert_array_equal(cut.tokens, whole.tokens)
    np.testing.assert_array_equal(cut.logprobs, whole.logprobs)
    assert (cut.text, cut.finish_reasons) == (whole.text, whole.finish_reasons)
    for name in ("target_forwards", "accepted_lengths", "proposed", "accepted", "row_layers", "num_new_tokens"):
        assert getattr(cut.stats, name) == getattr(whole.stats, name), name


@pytest.mark.parametrize("seconds", [0.0, 1e6])
def test_stop_strings_are_checked_after_the_same_tokens_wherever_the_loop_is_cut(seconds, monkeypatch):
    Calls(monkeypatch, seconds)
    pieces = []
    generate(["abc"], on_text=lambda row, piece: pieces.append(len(piece)), block_tokens=5)
    assert pieces == [5, 5, 2]


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_comes_between_two_calls_and_the_next_run_works(plain, monkeypatch):
    calls = Calls(monkeypatch, 0.0)
    measured = pace.Pace.measured

    @contextmanager
    def interrupting(self, max_tokens):
        if len(calls.tokens) == 3:
            signal.raise_signal(signal.SIGINT)
        with measured(self, max_tokens) as tokens:
            yield tokens

    monkeypatch.setattr(pace.Pace, "measured", interrupting)
    with pytest.raises(KeyboardInterrupt):
        generate()
    assert len(calls.tokens) == 3
    calls.tokens.clear()
    monkeypatch.setattr(pace.Pace, "measured", measured)
    np.testing.assert_array_equal(generate().tokens, plain.tokens)
