"""Every layer policy keeps the contract: what skips nothing is plain decoding, and what skips layers counts them.

One target, one shape, and for each policy one compiled loop, in which a drafter proposes trees.
"""

import dataclasses
from functools import cache
from itertools import pairwise

import jax
import numpy as np
import pytest

from decodax import decoding
from decodax.decoding.early_exit import METHODS as OURS
from decodax.decoding.early_exit import LayerPolicy
from decodax.decoding.verifiers import ExactMatch
from decodax.models.model import Model
from tests.contracts.examples import early_exit as made_by
from tests.contracts.examples.drafters import Target
from tests.contracts.lookup import examples_of
from tests.contracts.outside import with_outside
from tests.speculation import DRAFT_PARAMS, LENGTHS, MODEL, NEW, PARAMS, TOLERANCE, assert_same, plain, start
from tests.tiny import tiny_config

OPTIONS = "sampled"  # and one row is greedy
METHODS = with_outside(OURS, "early_exit")
EXAMPLES = examples_of(made_by, METHODS)
L = MODEL.config.num_layers
ALL_TOKENS = 1000
# A target that has one layer and another width, so that nothing made for the other fits.
OTHER = Model(dataclasses.replace(tiny_config(), blocks=tiny_config().blocks[:1], hidden_size=29))
each_example = pytest.mark.parametrize("name", EXAMPLES)


@cache
def example(name):
    written = np.pad(plain(OPTIONS).tokens, ((0, 0), (0, 1)))
    return EXAMPLES[name](Target(MODEL, PARAMS, DRAFT_PARAMS, written))


@cache
def compiled(drafter, layer_policy):
    """The start and the loop."""
    speculative = decoding.speculative(MODEL, drafter, ExactMatch(), layer_policy)
    return jax.jit(speculative.start), jax.jit(speculative)


def run(name, rows=slice(None), *, max_tokens=ALL_TOKENS):
    """The states after the start and after every `max_tokens`."""
    own = example(name)
    draft_params = own.draft_params
    if own.has_rows:
        draft_params = jax.tree.map(lambda leaf: leaf[np.arange(3)[rows]], draft_params)
    begin, decode = compiled(own.drafter, own.layer_policy)
    begun = start(rows, params=own.params, options=OPTIONS, layer_policy=own.layer_policy)
    states = [begin(own.params, draft_params, begun)]
    while not np.all(states[-1].done):
        states.append(decode(own.params, draft_params, states[-1], max_tokens))
    return states


@cache
def rounds(name):
    """The states after the start and after every round."""
    return run(name, max_tokens=1)


def row_rounds(name):
    """Rounds of each row before it was done."""
    return sum(~np.asarray(before.done) for before in rounds(name)[:-1])


@pytest.mark.parametrize("name", [name for name in EXAMPLES if not name.endswith(made_by.SKIPS)])
@pytest.mark.quick_cases(1)
def test_what_skips_nothing_writes_what_plain_decoding_writes(name):
    state = rounds(name)[-1]
    assert_same(state, plain(OPTIONS))
    assert np.sum(row_rounds(name)) < np.sum(NEW)  # draft tokens were accepted, so caches were written from a tree
    np.testing.assert_array_equal(state.layer_counts.row, L * row_rounds(name))
    assert int(state.layer_counts.batch) == L * (len(rounds(name)) - 1)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.endswith(made_by.SKIPS)])
def test_what_skips_layers_needs_fewer(name):
    state = rounds(name)[-1]
    assert np.sum(state.layer_counts.row) < L * np.sum(row_rounds(name))
    assert np.any(np.asarray(state.tokens) != plain(OPTIONS).tokens)


@pytest.mark.parametrize("method", METHODS)
def test_a_policy_has_an_example_that_skips_unless_it_is_lossless(method):
    skips = {name.endswith(made_by.SKIPS) for name in EXAMPLES if EXAMPLES.method_of(name) is METHODS[method]}
    assert skips == ({False} if METHODS[method].lossless else {False, True})


@each_example
def test_a_row_needs_no_more_layers_than_the_batch_runs(name):
    for before, after in pairwise(rounds(name)):
        row = np.asarray(after.layer_counts.row) - before.layer_counts.row
        batch = int(after.layer_counts.batch) - int(before.layer_counts.batch)
        done = np.asarray(before.done)
        assert np.all(row >= 0) and np.all(row[done] == 0) and np.max(row) <= batch <= min(L, np.sum(row))


@each_example
def test_every_layer_s_cache_has_every_token_but_the_last(name):
    for state in rounds(name):
        for cache_ in state.caches:
            np.testing.assert_array_equal(cache_.length, np.asarray(state.length) - 1)


@each_example
def test_a_row_is_the_same_in_another_batch(name):
    for rows in ([2, 0, 1], [0, 0, 2], [1, 1, 1], [2, 2, 2]):
        assert_same_rows(name, rows)


@pytest.mark.slow
@each_example
def test_a_row_alone_is_the_row_in_the_batch(name):
    for row in range(3):
        assert_same_rows(name, [row])


def assert_same_rows(name, rows):
    """Text, layers needed, and the policy's state after prefill; not what caches hold of tokens that skip a layer."""
    begun, got = run(name, rows)
    (begun_want, *_, want) = rounds(name)
    if not name.endswith(made_by.SKIPS):
        assert_same(got, want, rows)
    for field in ("tokens", "length", "done", "failed"):
        np.testing.assert_array_equal(getattr(got, field), np.asarray(getattr(want, field))[rows], err_msg=field)
    np.testing.assert_allclose(got.logprobs, np.asarray(want.logprobs)[rows], atol=TOLERANCE)
    np.testing.assert_array_equal(got.layer_counts.row, np.asarray(want.layer_counts.row)[rows])
    for mine, other in zip(*(jax.tree.leaves(state.layer_policy) for state in (begun, begun_want)), strict=True):
        np.testing.assert_array_equal(mine, np.asarray(other)[rows])


@each_example
def test_its_state_has_a_row_for_each_row(name):
    own = example(name)
    for batch in (2, 5):
        assert all(leaf.shape[0] == batch for leaf in jax.tree.leaves(own.layer_policy.start(MODEL, own.params, batch)))
    begun = jax.eval_shape(lambda: own.layer_policy.start(MODEL, own.params, 3))
    for state in (rounds(name)[0], rounds(name)[-1]):
        kept = state.layer_policy
        assert jax.tree.structure(kept) == jax.tree.structure(begun)
        for mine, wanted in zip(jax.tree.leaves(kept), jax.tree.leaves(begun), strict=True):
            assert (mine.shape, mine.dtype) == (wanted.shape, wanted.dtype)


@each_example
def test_the_policy_of_prompts_prefills_them(name):
    """All but the last token of each prompt; without one all layers run, and the caches are plain decoding's."""
    own = example(name)
    policy = own.layer_policy.prefill_policy
    assert policy is None or (isinstance(policy, LayerPolicy) and isinstance(hash(policy), int))
    begun, want = rounds(name)[0], start(params=own.params, options=OPTIONS)
    np.testing.assert_array_equal(begun.length, LENGTHS)
    if policy is None or not name.endswith(made_by.SKIPS):
        for mine, wanted in zip(begun.caches, want.caches, strict=True):
            np.testing.assert_allclose(mine.key, wanted.key, atol=TOLERANCE)
            np.testing.assert_allclose(mine.value, wanted.value, atol=TOLERANCE)


@each_example
def test_it_is_frozen_and_hashable(name):
    layer_policy, again = example(name).layer_policy, example.__wrapped__(name).layer_policy
    assert type(layer_policy) is EXAMPLES.method_of(name)
    assert layer_policy == again and hash(layer_policy) == hash(again)  # one compiled program serves both
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer_policy.lossless = not layer_policy.lossless


@each_example
def test_a_target_that_it_was_not_made_for_is_refused(name):
    """All but the policy that needs nothing of a target."""
    own = example(name)
    own.layer_policy.check(MODEL, own.params)
    if own.layer_policy.auxiliary_weights is None:
        own.layer_policy.check(OTHER, own.params)
        return
    with pytest.raises(ValueError, match="got"):
        own.layer_policy.check(OTHER, own.params)
