"""A continuation's tokens are those that lm-evaluation-harness counts, after one start token and never two."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from decodax.decoding.continuations import encode_continuations, encode_text
from decodax.models.load import LanguageModel
from decodax.models.tokenizers.tokenizer import Tokenizer
from tests.tiny import tiny_model

WORDS = ["<s>", "</s>", "a", "b", "c", " ", "\n", "ab", "bc", " a", "abc"]
MODEL, PARAMS = tiny_model(vocab_size=len(WORDS))
START, END, A, B, C, SPACE, NEWLINE, AB, BC, SPACE_A, ABC = range(len(WORDS))


def model(around=None, merges=(("a", "b"), ("b", "c"), (" ", "a"), ("ab", "c")), **options):
    """One that merges "ab", "bc", " a" and "abc"; `around` is what the file's rule puts around a text ($A)."""
    backend = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, list(merges)))
    backend.add_special_tokens(["<s>", "</s>"])
    if around is not None:
        backend.post_processor = processors.TemplateProcessing(around, None, [("<s>", START), ("</s>", END)])
    return LanguageModel(MODEL, MODEL.config, PARAMS, Tokenizer(backend, **options), Path("tiny"), ())


PLAIN = model()
# A start token from the file's rule, with an end token, and from tokenizer_config.json.
STARTED = {
    "start": model("<s> $A"),
    "start and end": model("<s> $A </s>"),
    "settings": model(prefix=[START]),
    "settings, both": model(prefix=[START], suffix=[END]),
}


def encoded(lm, prompt, continuation):
    ((tokens, first),) = encode_continuations(lm, [prompt], [continuation])
    assert tokens.dtype == np.int64
    return tokens[:first].tolist(), tokens[first:].tolist()


@pytest.mark.parametrize(
    ("prompt", "continuation", "expected"),
    [
        ("c", "b", ([C], [B])),
        ("c ", "a", ([C], [SPACE_A])),  # the space goes to the continuation
        ("c\n ", "a", ([C], [NEWLINE, SPACE_A])),  # as all white space
        ("c", " a", ([C], [SPACE_A])),
        ("ca", "bc", ([C, ABC], [])),  # together "c", "abc": nothing is left
        ("ab", "cb", ([ABC], [B])),  # "abc" is one token, as many as "ab" alone
        ("a", "b c", ([AB], [SPACE, C])),
    ],
)
def test_texts_are_encoded_together(prompt, continuation, expected):
    if not expected[1]:
        with pytest.raises(ValueError, match="continuation 0, 'bc', has no token of its own after its prompt: give"):
            encoded(PLAIN, prompt, continuation)
        return
    assert encoded(PLAIN, prompt, continuation) == expected
    for lm in STARTED.values():  # one start token, and no end token before the continuation or after it
        assert encoded(lm, prompt, continuation) == ([START, *expected[0]], expected[1])
        assert encoded(lm, "<s>" + prompt, continuation) == ([START, *expected[0]], expected[1])


@pytest.mark.parametrize("kind", STARTED)
def test_an_empty_prompt_is_the_start_token(kind):
    lm = STARTED[kind]
    assert encoded(lm, "", "cb") == ([START], [C, B])
    assert encoded(lm, " ", "a") == ([START], [SPACE_A])
    assert encoded(lm, "", "<s>cb") == ([START], [C, B])
    assert encoded(lm, [], [C, B]) == encoded(lm, "", [C, B]) == ([START], [C, B])
    assert encode_text(lm, "text", "cb") == encode_text(lm, "text", "<s>cb") == [START, C, B]


def test_ids_are_taken_as_they_are():
    for lm in (PLAIN, STARTED["start and end"]):
        assert encoded(lm, [A, END], [B, C]) == ([A, END], [B, C])
        assert encoded(lm, [A, SPACE], "bc") == ([A, SPACE], [BC])
    assert encoded(STARTED["start"], "ab ", [C]) == ([START, AB, SPACE], [C])
    assert encode_text(PLAIN, "text", "cb") == [C, B]


def test_one_or_many_in_every_form():
    want = [([C], [B]), ([A], [C, C])]
    for prompts, continuations in (
        (["c", "a"], ["b", "cc"]),
        (("c", [A]), [[B], "cc"]),
        (iter(["c", "a"]), np.array(["b", "cc"])),
        ([np.array([C]), jnp.array([A])], [[B], (C, C)]),
    ):
        found = encode_continuations(PLAIN, prompts, continuations)
        assert [(row.tokens[: row.first].tolist(), row.tokens[row.first :].tolist()) for row in found] == want
    for prompts, continuations in (("c", "b"), ([C], "b"), (np.array([C]), jnp.array([B]))):
        assert len(encode_continuations(PLAIN, prompts, continuations)) == 1


NO_TOKENIZER = dataclasses.replace(PLAIN, tokenizer=None)


@pytest.mark.parametrize(
    ("lm", "prompts", "continuations", "message"),
    [
        (PLAIN, ["a", "b"], ["c"], "continuations must be one for each prompt, got 1 continuations and 2 prompts"),
        (PLAIN, [], [], "prompts must hold at least one prompt, got none"),
        (PLAIN, None, ["c"], "prompts must be a text or a list of token ids, or a list of such prompts, got None"),
        (PLAIN, ["a"], {"c"}, "continuations must be a text or .*, or a list of such continuations, got {'c'}"),
        (PLAIN, ["a", 5], ["c", "c"], "prompt 1 must be a text or a list of token ids, got 5"),
        (PLAIN, [[{"role": "user"}]], ["c"], "prompt 0 must be a text or a list of token ids, got"),
        (PLAIN, ["a"], [[1.5]], r"continuation 0 must be a text or a list of token ids, got \[1.5\]"),
        (PLAIN, ["a", "c"], ["c", ""], "continuation 1 is empty: it must hold at least one token"),
        (PLAIN, ["a"], [[]], "continuation 0 is empty: it must hold at least one token"),
        (PLAIN, ["a", ""], ["c", "c"], "prompt 1 is empty, and this model's tokenizer puts no start token before"),
        (PLAIN, [[]], [[C]], "prompt 0 is empty"),
        (PLAIN, [" "], ["c"], "prompt 0 is empty"),
        (NO_TOKENIZER, [[A], "a"], [[C], [C]], "tiny has no tokenizer.json: pass token ids instead of text"),
        (NO_TOKENIZER, [[A]], ["c"], "tiny has no tokenizer.json: pass token ids instead of text"),
        (NO_TOKENIZER, [[]], [[C]], "prompt 0 is empty"),
        (PLAIN, [[A, 11]], [[C]], r"prompt 0: token ids must be in 0\.\.10 \(the vocabulary\), got 11"),
        (PLAIN, [[A]], [[C, -1]], r"continuation 0: token ids must be in 0\.\.10 \(the vocabulary\), got -1"),
        (PLAIN, ["\ud800"], ["c"], "prompt 0 must be text, and its character 0 is the lone surrogate"),
    ],
)
def test_bad_input_is_refused_by_its_index(lm, prompts, continuations, message):
    with pytest.raises(ValueError, match=message):
        encode_continuations(lm, prompts, continuations)


def test_a_token_that_the_model_lacks_is_refused():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "z": 11}))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    lm = dataclasses.replace(PLAIN, tokenizer=Tokenizer(backend))
    with pytest.raises(ValueError, match="prompt 0 with its continuation holds 'z', which is token 11 in the"):
        encode_continuations(lm, "a", "z")
    with pytest.raises(ValueError, match="the text holds 'z', which is token 11"):
        encode_text(lm, "the text", "az")
