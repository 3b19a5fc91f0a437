"""Logits processors of one's own: a function that reads the tokens so far, or an object with arrays, end to end."""

from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax.core import pytree
from decodax.decoding import Sampling
from decodax.decoding.logits_processors import History, LogitsProcessor
from decodax.decoding.sampling import processed_logits
from decodax.decoding.tree import Tree
from decodax.decoding.tree_logits import node_history
from tests import budget
from tests.decoding.test_generation import LM, PROMPTS

NEW = 16
VOCABULARY = LM.config.vocab_size


def no_repeated_pair(logits, history):
    """Forbids each token that followed the last one anywhere before, in the prompt or the output."""
    place = jnp.arange(history.tokens.shape[1])
    last = jnp.take_along_axis(history.tokens, history.length[:, None] - 1, axis=1)
    follows = (history.tokens[:, :-1] == last) & (place[None, 1:] < history.length[:, None])
    seen = jnp.zeros(logits.shape, jnp.int32).at[jnp.arange(len(logits))[:, None], history.tokens[:, 1:]]
    return jnp.where(seen.max(follows.astype(jnp.int32), mode="drop") > 0, -jnp.inf, logits)


@pytree.dataclass
class Towards(LogitsProcessor):
    """Raises one token of each row, by a number that may change from call to call."""

    token: jax.Array
    by: jax.Array

    def axes(self):
        return Towards("B", "B")

    def __call__(self, logits, history):
        is_token = jnp.arange(logits.shape[1])[None] == self.token[:, None]
        return jnp.where(is_token, logits + self.by[:, None], logits)


def generate(**options):
    return decodax.generate(LM, PROMPTS, max_new_tokens=NEW, stop_token_ids=[], **options)


def ids_of(out, row):
    return [*LM.tokenizer.encode(PROMPTS[row]), *out.tokens[row].tolist()]


def expected(prompt):
    """Greedy decoding by hand: the most probable token that makes no pair of tokens a second time."""
    ids = list(LM.tokenizer.encode(prompt))
    for _ in range(NEW):
        padded = [*ids, *[0] * (64 - len(ids))]
        logits = np.array(decodax.logits(LM, [padded])[0, len(ids) - 1])
        logits[[after for before, after in pairwise(ids) if before == ids[-1]]] = -np.inf
        ids.append(int(np.argmax(logits)))
    return ids


def test_a_function_reads_the_tokens_so_far():
    out, plain = generate(logits_processors=no_repeated_pair), generate()
    for row, prompt in enumerate(PROMPTS):
        assert ids_of(out, row) == expected(prompt)
    assert any(list(mine) != list(other) for mine, other in zip(out.tokens, plain.tokens, strict=True))


@pytest.mark.parametrize("strategy", ["layer_skip", "draft_tree", "draft_model"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.quick_cases(2)
def test_drafts_are_verified_with_it(strategy, temperature):
    """Every node of a tree has the text of its own path; so verified tokens are those of plain decoding."""
    options = {"logits_processors": [no_repeated_pair], "temperature": temperature, "seed": [3, 5, 7]}
    drafted = generate(strategy=strategy, draft=LM if strategy.startswith("draft") else None, **options)
    assert drafted.stats.tokens_per_forward > 1
    if temperature == 0 or strategy != "draft_model":  # rejection sampling draws other numbers
        for mine, plain in zip(drafted.tokens, generate(**options).tokens, strict=True):
            np.testing.assert_array_equal(mine, plain)
    for row in range(len(PROMPTS)):
        ids, start = ids_of(drafted, row), len(LM.tokenizer.encode(PROMPTS[row]))
        pairs = list(pairwise(ids))
        assert all(pair not in pairs[:place] for place, pair in enumerate(pairs) if place >= start - 1)


def test_an_object_with_arrays_compiles_once_and_goes_with_its_row():
    towards = Towards(jnp.array([3, 4, 5]), jnp.array([100.0, 0.0, 100.0]))
    out, plain = generate(logits_processors=towards), generate()
    assert set(out.tokens[0].tolist()) == {3} and set(out.tokens[2].tolist()) == {5}
    np.testing.assert_array_equal(out.tokens[1], plain.tokens[1])
    programs = budget.num_programs()
    other = generate(logits_processors=Towards(jnp.array([6, 6, 6]), jnp.array([0.0, 100.0, 0.0])))
    assert budget.num_programs() == programs and set(other.tokens[1].tolist()) == {6}
    samples = generate(logits_processors=towards, n=2, temperature=0.5)
    assert [set(tokens.tolist()) == {3} for tokens in samples.tokens] == [True, True, *[False] * 4]


def test_the_same_function_compiles_once():
    generate(logits_processors=no_repeated_pair)
    programs = budget.num_programs()
    generate(logits_processors=no_repeated_pair)
    assert budget.num_programs() == programs


def test_own_processors_come_before_the_temperature():
    options = {"temperature": 0.5, "repetition_penalty": 1.5, "top_k": 3}
    sampling = Sampling.create(2, VOCABULARY, logits_processors=no_repeated_pair, **options)
    names = [processor.name for processor in sampling.processors]
    assert names == ["RepetitionPenalty", "no_repeated_pair", "Temperature", "TopK"]
    assert sampling.needs_tokens and not Sampling.create(2, VOCABULARY, **options).needs_tokens


def test_the_tokens_of_a_history_follow_rows_and_paths():
    """Tokens are appended up to each row's count; every node of a tree has those of its path."""
    prompt, length = jnp.array([[4, 7, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0]]), jnp.array([2, 1])
    history = History.start(prompt, length, vocab_size=11, with_counts=False, with_tokens=True)
    history = history.record(jnp.array([[1, 2], [3, 5]]), jnp.array([1, 2]))
    np.testing.assert_array_equal(history.tokens, [[4, 7, 1, 0, 0, 0], [9, 3, 5, 0, 0, 0]])
    np.testing.assert_array_equal(history.length, [3, 3])
    tree = Tree.fixed((-1, 0, 0, 1, 2))
    nodes = node_history(history, tree, jnp.array([[1, 6, 7, 8, 9], [5, 2, 3, 4, 6]]))
    np.testing.assert_array_equal(nodes.length, [[3, 4, 4, 5, 5]] * 2)
    for row, paths in enumerate(([[], [6], [7], [6, 8], [7, 9]], [[], [2], [3], [2, 4], [3, 6]])):
        for node, path in enumerate(paths):
            text = [*history.tokens[row, :3].tolist(), *path]
            np.testing.assert_array_equal(nodes.tokens[row, node, : len(text)], text)


@dataclass(frozen=True)
class Unregistered(LogitsProcessor):
    """A processor that is no pytree."""


class Unhashable:
    """Can be called, and not hashed."""

    __hash__ = None

    def __call__(self, logits, history):
        return logits


@pytest.mark.parametrize("wrong", [3, "top_k", [None], LogitsProcessor, Unregistered(), {"top_k": 3}])
def test_what_is_no_processor_is_refused(wrong):
    with pytest.raises(ValueError, match=r"logits_processors must be functions \(logits, history\) -> logits, or"):
        generate(logits_processors=wrong)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (lambda logits, history: logits[:, :3], r"float32 of shape \(3, 3\)"),
        (lambda logits, history: logits.astype(jnp.bfloat16), "bfloat16 of shape"),
        (lambda logits, history: None, "None"),
    ],
)
def test_what_gives_no_logits_is_refused(wrong, found):
    with pytest.raises(ValueError, match=rf"processor <lambda> must give logits, float32 of shape \(3, .*got {found}"):
        generate(logits_processors=wrong)


def test_what_cannot_be_hashed_is_refused():
    with pytest.raises(ValueError, match="logits_processors must be hashable"):
        generate(logits_processors=Unhashable())


def test_logits_keep_their_dtype():
    sampling = Sampling.create(1, 5, logits_processors=[lambda logits, history: logits * 2])
    history = History(None, None, jnp.zeros(1, jnp.int32))
    doubled = processed_logits(sampling, jnp.ones((1, 5), jnp.bfloat16), history)
    assert doubled.dtype == jnp.float32 and float(doubled[0, 0]) == 2


@pytest.mark.parametrize("strategy", [None, "prompt_lookup"])
@pytest.mark.parametrize("given", [jnp.nan, -jnp.inf, jnp.inf], ids=str)
def test_a_row_without_a_token_to_choose_fails_and_no_other(strategy, given):
    """From the third new token on, in the second row; NaN and +inf in all of a row's logits choose nothing either."""

    def spoils(logits, history):
        is_second = jnp.arange(len(logits)) == 1
        return jnp.where((is_second & (history.num_new_tokens >= 2))[:, None], given, logits)

    plain, out = generate(temperature=0.7), generate(temperature=0.7, logits_processors=spoils, strategy=strategy)
    assert out.finish_reasons == ["length", "failed", *["length"] * (len(PROMPTS) - 2)]
    assert len(out.tokens[1]) == 2
    for row in (index for index in range(len(PROMPTS)) if index != 1):
        np.testing.assert_array_equal(out.tokens[row], plain.tokens[row])
