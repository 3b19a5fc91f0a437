"""Every generation satisfies the relations, over a few options: rows alone, text, lengths, logprobs, stops."""

from dataclasses import replace

import numpy as np
import pytest

import decodax
from decodax.decoding.strategies import METHODS
from tests.fuzz import metamorphic
from tests.fuzz.subjects.options import model_with_tokenizer
from tests.fuzz.verdict import WrongResult

NOT_EMBEDDED = ("mtp",)  # strategies that need another model
PROMPTS = ([5, 6, 7], [9, 11], [3, 13, 17, 19, 23])
NEW = 11

GREEDY: list[dict] = [
    {},
    {"stop_token_ids": [], "stop": ()},
    {"repetition_penalty": 1.3},
    {"logit_bias": [{5: 3.0}, None, {7: -3.0}]},
    {"strategy": "prompt_lookup"},
]
SAMPLED: list[dict] = [
    {"temperature": 0.9, "seed": [1, 2, 3]},
    {"temperature": [0.0, 0.7, 1.3], "seed": 4},
    {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "seed": 7},
]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return model_with_tokenizer(tmp_path_factory.mktemp("model"))


def _generated(lm, options):
    options = {"max_new_tokens": NEW} | options
    result = decodax.generate(lm, list(PROMPTS), **options)
    metamorphic.check_generation(lm, result, list(PROMPTS), options)
    return result, options


def test_a_row_is_the_row_alone(lm):
    result, options = _generated(lm, SAMPLED[1])
    metamorphic.check_rows_alone(lm, PROMPTS, options, result, [1])


def test_violated_relations_are_found(lm):
    result, options = _generated(lm, {"stop_token_ids": []})
    metamorphic.check_logprobs(lm, PROMPTS, result, [1])
    planted = {
        "logprobs": [result.logprobs[0], result.logprobs[1][:-1], result.logprobs[2]],
        "tokens": [result.tokens[0][:-1], *result.tokens[1:]],
        "finish_reasons": ["failed", "length", "length"],
        "text": [result.text[0] + "x", *result.text[1:]],
    }
    for field, value in planted.items():
        with pytest.raises(WrongResult):
            metamorphic.check_generation(lm, replace(result, **{field: value}), list(PROMPTS), options)
    ended = options | {"stop_token_ids": [int(result.tokens[0][1])]}
    with pytest.raises(WrongResult, match="goes on after a stop token"):
        metamorphic.check_generation(lm, result, list(PROMPTS), ended)
    with pytest.raises(WrongResult, match="log-probabilities off"):
        changed = replace(result, logprobs=[np.asarray(one) - 0.01 for one in result.logprobs])
        metamorphic.check_logprobs(lm, PROMPTS, changed, [1])


@pytest.mark.slow
@pytest.mark.parametrize("options", GREEDY + SAMPLED, ids=str)
def test_all_relations(lm, options):
    result, options = _generated(lm, options)
    metamorphic.check_rows_alone(lm, PROMPTS, options, result, range(len(PROMPTS)))
    metamorphic.check_logprobs(lm, PROMPTS, result, range(len(PROMPTS)))
    reversed_rows = decodax.generate(lm, list(PROMPTS)[::-1], **_reversed(options | {"seed": result.seeds}))
    for mine, other in zip(result.tokens, reversed_rows.tokens[::-1], strict=True):
        np.testing.assert_array_equal(mine, other)


def _reversed(options):
    return {
        name: value[::-1] if isinstance(value, list) and len(value) == 3 else value for name, value in options.items()
    }


def test_stops_are_where_they_appear(lm):
    """A stop string or token taken from the output ends the row there, and changes nothing before it."""
    plain, _ = _generated(lm, {"stop_token_ids": []})
    for place in (1, 6):
        stop = plain.text[0][place]
        stopped, _ = _generated(lm, {"stop_token_ids": [], "stop": stop})
        assert stopped.text[0] == plain.text[0][: plain.text[0].index(stop)]
        assert stopped.finish_reasons[0] == "stop"
        token = int(plain.tokens[0][place])
        ended, _ = _generated(lm, {"stop_token_ids": [token]})
        first = plain.tokens[0].tolist().index(token)
        np.testing.assert_array_equal(ended.tokens[0], plain.tokens[0][: first + 1])


def test_fewer_tokens_are_the_first_of_more(lm):
    more, _ = _generated(lm, {"stop_token_ids": []})
    fewer, _ = _generated(lm, {"stop_token_ids": [], "max_new_tokens": 4})
    for long, short in zip(more.tokens, fewer.tokens, strict=True):
        np.testing.assert_array_equal(long[:4], short)


def test_streamed_pieces_are_the_text(lm):
    for block in (1, 3):
        pieces = [""] * len(PROMPTS)

        def collect(row, piece, pieces=pieces):
            pieces[row] += piece

        result, _ = _generated(lm, {"stop_token_ids": [], "stop": "zz", "on_text": collect, "block_tokens": block})
        assert pieces == result.text


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [name for name in METHODS if name not in ("autoregressive", *NOT_EMBEDDED)])
def test_strategies_satisfy_the_relations_and_lossless_ones_give_plain_decoding(strategy):
    lm = decodax.load()
    prompts = ["def fibonacci(n):", "import os\n", "x = [1, 2, 3]\nfor"]
    plain = decodax.generate(lm, prompts, max_new_tokens=23)
    drafted = decodax.generate(lm, prompts, max_new_tokens=23, strategy=strategy)
    metamorphic.check_generation(lm, drafted, prompts, {"max_new_tokens": 23})
    if METHODS[strategy].lossless:
        metamorphic.assert_same_on_all_processes(drafted, plain, strategy)
