"""`generate` takes options as programs pass them: None for "not given", values of NumPy and JAX; errors name them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from decodax.decoding.options import GenerateOptions
from decodax.decoding.prompts import encode_prompts
from decodax.decoding.random import fold_seed
from tests.decoding.test_generation import LM, ids

DEFAULTS = GenerateOptions()
NAMES = [field.name for field in dataclasses.fields(GenerateOptions)]


def test_none_is_not_given():
    assert GenerateOptions(**dict.fromkeys(NAMES)) == DEFAULTS
    sampling = GenerateOptions(**dict.fromkeys(NAMES)).sampling(3, 37, ())
    assert sampling.processors == () and not sampling.do_sample


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("max_new_tokens", np.int64(7), 7),
        ("max_new_tokens", jnp.int32(7), 7),
        ("max_new_tokens", np.array(7), 7),
        ("max_new_tokens", 7.0, 7),
        ("max_new_tokens", 10**400, 2**31 - 1),
        ("block_tokens", 2**40, 2**31 - 1),
        ("draft_tokens", np.uint8(7), 7),
        ("draft_tokens", 7.0, 7),
        ("stop_token_ids", np.array([7], np.int32), (7,)),
        ("stop_token_ids", jnp.array([7, 11]), (7, 11)),
        ("stop_token_ids", (7, 11), (7, 11)),
        ("stop_token_ids", {7}, (7,)),
        ("stop_token_ids", [], ()),
        ("stop", "ab", ("ab",)),
        ("stop", ("ab", "c"), ("ab", "c")),
        ("stop", np.array(["ab", "c"]), ("ab", "c")),
        ("seed", jnp.uint32(7), 7),
        ("seed", -1, 2**32 - 1),
        ("seed", 2**64 + 7, 7),
        ("seed", (7, None, np.int8(3)), [7, None, 3]),
        ("temperature", jnp.array([0.5, 2]), [0.5, 2]),
        ("top_k", iter((7, 11)), [7, 11]),
    ],
)
def test_values_of_every_kind(name, value, kept):
    options = GenerateOptions(**{name: value})
    assert getattr(options, name) == kept and getattr(dataclasses.replace(options, min_p=0.5), name) == kept


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("max_new_tokens", (0, -1, 1.5, True, "7", [7], float("nan"), {}), "a whole number, at least 1"),
        ("block_tokens", (0, 2.5, False, b"7", int), "a whole number, at least 1"),
        ("draft_tokens", (0, -1, 1.5, True, "3", "Auto", [4], b"4"), "a whole number, at least 1, or 'auto'"),
        ("stop", (5, True, [5], ["a", ""], b"ab", {"ab": 1}), "one or more non-empty strings"),
        (
            "stop_token_ids",
            ("x", 7, np.int32(7), [[0]], [None], 1.0, True, {"a": 1}),
            r"a list of token ids \(integers\)",
        ),
        ("seed", (0.5, "7", True, [0.5], {3}, {3: 4}, b"7"), "a whole number, or one per prompt"),
        ("on_text", (5, "print", [print]), "a function of a row and a piece of text"),
    ],
)
def test_refusals_name_the_option(name, values, expected):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name} must be {expected}, got .+$"):
            GenerateOptions(**{name: value})


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "repetition_penalty", "logit_bias"])
def test_refusals_of_the_sampler_name_the_option(name):
    for value in ("hot", {1}, b"1", True, object(), [None, "x"], [[1], [2]], np.array("x")):
        with pytest.raises(ValueError, match=rf"^{name}.* must be .+, got .+$"):
            GenerateOptions(**{name: value}).sampling(2, 37, ())


def test_stop_tokens_outside_the_vocabulary_are_named_as_they_were_passed():
    for value in ([37], [3, 37], [-1], [10**30]):
        with pytest.raises(ValueError, match=r"^stop_token_ids must be token ids in 0\.\.36 \(the vocabulary\), got "):
            GenerateOptions(stop_token_ids=value).end_tokens((99,), 37)
    assert GenerateOptions(stop_token_ids=(3,)).end_tokens((5,), 37) == (3,)
    assert GenerateOptions(stop_token_ids=[3, 7, 3] * 9).end_tokens((5,), 37) == (3, 7)  # each once
    assert DEFAULTS.end_tokens((5,), 37) == (5,)


def test_seeds_per_row():
    np.testing.assert_array_equal(GenerateOptions(seed=[7, None, -1]).seeds(3), [7, fold_seed(0, 1), 2**32 - 1])
    np.testing.assert_array_equal(GenerateOptions(seed=np.uint64(2**63 + 7)).seeds(2), [7, fold_seed(7, 1)])
    with pytest.raises(ValueError, match=r"seed must be a whole number, or one per prompt \(3\), got 2 numbers"):
        GenerateOptions(seed=[7, 11]).seeds(3)


@pytest.mark.parametrize(
    "prompts",
    [
        ["abc", "x"],
        ("abc", "x"),
        (text for text in ("abc", "x")),
        {"abc": 1, "x": 2}.keys(),
        np.array(["abc", "x"]),
        [ids("abc"), ids("x")],
        [np.array(ids("abc")), jnp.array(ids("x"))],
        [list(jnp.array(ids("abc"))), tuple(ids("x"))],
        (iter(ids("abc")), "x"),
    ],
)
def test_prompts_of_every_kind(prompts):
    assert [row.tolist() for row in encode_prompts(LM, prompts)] == [ids("abc"), ids("x")]


def test_one_prompt():
    for prompt in ("abc", np.array("abc"), ids("abc"), np.array(ids("abc")), jnp.array(ids("abc")), tuple(ids("abc"))):
        assert [row.tolist() for row in encode_prompts(LM, prompt)] == [ids("abc")]
    for many in (np.arange(6).reshape(2, 3), jnp.arange(6).reshape(2, 3)):
        assert [row.tolist() for row in encode_prompts(LM, many)] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (
            None,
            "prompts must be a text, a list of token ids or a list of messages, or a list of such prompts, got N",
        ),
        (5, "prompts must be .*, got 5"),
        (True, "prompts must be .*, got True"),
        (b"abc", "prompts must be .*, got b'abc'"),
        ({"input_ids": [1]}, "prompts must be .*, got {'input_ids': "),
        ({"abc"}, "prompts must be .*, got {'abc'}"),
        (object(), "prompts must be .*, got <object"),
        ([None], "prompt 0 must be a text, a list of token ids or a list of messages, got None"),
        (["abc", 5], "prompt 1 must be .*, got 5"),
        (["abc", b"abc"], "prompt 1 must be .*, got b'abc'"),
        ([5, "abc"], r"prompt 0 must be .*, got \[5, 'abc'\]"),
        ([[5, True]], r"prompt 0 must be .*, got \[5, True\]"),
        ([[1.0, 2.0]], r"prompt 0 must be .*, got \[1\.0, 2\.0\]"),
        (np.zeros((1, 2, 3), int), r"prompt 0 must be .*, got \[\[0, 0, 0\], \[0, 0, 0\]\]"),
        (np.zeros(3), "prompt 0 must be .*, got 0.0"),
        ([[1], [10**30]], r"prompt 1: token ids must be in 0\.\.36 \(the vocabulary\), got 10+$"),
        ("abc \udce9", r"prompt 0 must be text, and its character 4 is the lone surrogate '\\udce9'"),
        (["abc", "\ud800"], r"prompt 1 must be text, and its character 0 is the lone surrogate '\\ud800'"),
    ],
)
def test_bad_prompts_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        encode_prompts(LM, prompts)
