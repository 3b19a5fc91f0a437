"""Every drafter keeps the contract: whatever it proposes, exact match writes what plain decoding writes.

One target, one shape, and for each example one start and one loop, compiled for a batch of a greedy row and two sampled
ones, with every sampling option. The loop is watched round by round.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tests.speculation
from decodax import decoding
from decodax.decoding.drafters import METHODS as OURS
from decodax.decoding.drafters import Children, Drafter, LayerProposal
from decodax.decoding.rows import repeat_rows
from decodax.decoding.verifiers import ExactMatch
from decodax.models.model import Model
from tests.contracts.examples import drafters as made_by
from tests.contracts.lookup import examples_of
from tests.contracts.outside import with_outside
from tests.speculation import (
    LENGTHS,
    MODEL,
    NEW,
    VOCABULARY,
    assert_same,
    disturbed,
    plain_decode,
    start,
    texts,
)
from tests.tiny import tiny_config

OPTIONS = "every option"
EXAMPLES = examples_of(made_by, with_outside(OURS, "drafters"))
ALL_TOKENS = 1000
# A target that has another vocabulary and another width, so that no weights for the one fit the other.
OTHER = Model(dataclasses.replace(tiny_config(vocab_size=41), hidden_size=29))
each_example = pytest.mark.parametrize("name", EXAMPLES)


def damped(params):
    """The parameters with a second layer that adds little, so that an exit after the first is often right."""

    def change(path, leaf):
        names = [key.key for key in path]
        adds = names[0] == "blocks_1" and names[-1] in ("out", "out_bias", "down", "down_bias")
        return leaf * jnp.float32(0.05) if adds else leaf

    return jax.tree_util.tree_map_with_path(change, params)


PARAMS = damped(tests.speculation.PARAMS)


@cache
def plain():
    """The state in which plain decoding ends."""
    return plain_decode(PARAMS, start(params=PARAMS, options=OPTIONS))


@cache
def target():
    written = np.pad(plain().tokens, ((0, 0), (0, 1)))
    return made_by.Target(MODEL, PARAMS, disturbed(PARAMS, 0.03), written)


@cache
def example(name):
    return EXAMPLES[name](target())


@dataclass(frozen=True)
class Watched(Drafter):
    """Drafts as another drafter does, and keeps its last proposal."""

    inner: Drafter
    num_nodes = property(lambda self: self.inner.num_nodes)
    max_depth = property(lambda self: self.inner.max_depth)
    children = property(lambda self: self.inner.children)
    capture = property(lambda self: self.inner.capture)

    def check(self, model, draft_params):
        self.inner.check(model, draft_params)

    def start(self, params, draft_params, state):
        state = dataclasses.replace(state, draft=self.inner.start(params, draft_params, state))
        shapes = jax.eval_shape(lambda: kept(self.inner.propose(params, draft_params, state)[0]))
        return state.draft, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def propose(self, params, draft_params, state):
        own = dataclasses.replace(state, draft=state.draft[0])
        proposal, draft = self.inner.propose(params, draft_params, own)
        return proposal, (draft, kept(proposal))

    def update(self, params, draft_params, state, outcome):
        draft, proposal = state.draft
        own = dataclasses.replace(state, draft=draft)
        return self.inner.update(params, draft_params, own, outcome), proposal

    def constrained(self, draft, model):
        return self.inner.constrained(draft[0], model), draft[1]


def kept(proposal):
    """What the tests look at."""
    tree, shape = proposal.tree, proposal.token.shape
    return {
        "token": proposal.token,
        "is_candidate": proposal.is_candidate,
        "parent": jnp.broadcast_to(jnp.asarray(tree.parent), shape),
        "depth": jnp.broadcast_to(jnp.asarray(tree.depth), shape),
        "ancestors": jnp.broadcast_to(jnp.asarray(tree.ancestors), (*shape, shape[1])),
        "logprobs": proposal.logprobs,
        "num_draft_forwards": proposal.num_draft_forwards,
        "layers": jnp.int32(isinstance(proposal, LayerProposal) and proposal.has_run_layers),
    }


@cache
def compiled(drafter):
    """The start and the loop."""
    speculative = decoding.speculative(MODEL, drafter, ExactMatch())
    return jax.jit(speculative.start), jax.jit(speculative)


def run(name, rows=slice(None), *, max_tokens=ALL_TOKENS, **changes):
    """The states after the start and after every `max_tokens`."""
    own = example(name)
    draft_params = own.draft_params
    if own.has_rows:
        draft_params = jax.tree.map(lambda leaf: leaf[np.arange(3)[rows]], draft_params)
    begin, decode = compiled(Watched(own.drafter))
    states = [begin(PARAMS, draft_params, start(rows, params=PARAMS, options=OPTIONS, **changes))]
    while not np.all(states[-1].done):
        states.append(decode(PARAMS, draft_params, states[-1], max_tokens))
    return states


@cache
def rounds(name):
    """The states after the start and after every round."""
    return run(name, max_tokens=1)


def proposals(name):
    """The state before each round, and the proposal of the round, in NumPy."""
    states = rounds(name)
    return [(before, jax.tree.map(np.asarray, after.draft[1])) for before, after in pairwise(states)]


@each_example
@pytest.mark.quick_cases(6)
def test_what_is_written_is_what_plain_decoding_writes(name):
    state = rounds(name)[-1]
    assert_same(state, plain())
    accepted, proposed = int(state.counts.accepted.sum()), int(state.counts.proposed.sum())
    if example(name).drafter.max_depth:  # otherwise nothing was tested
        assert 0 < accepted < proposed
    else:
        assert proposed == 0 and int(state.num_target_forwards) == int(plain().num_target_forwards)


@each_example
@pytest.mark.quick_cases(5)
def test_a_row_is_the_same_in_another_batch(name):
    """Elsewhere in the batch, beside itself, and where rows are missing; with the options, so that nothing compiles."""
    for rows in ([2, 0, 1], [0, 0, 2], [1, 1, 2], [2, 2, 2]):
        assert_same(run(name, rows)[-1], plain(), rows)


@pytest.mark.slow
@each_example
def test_a_row_alone_is_the_row_in_the_batch(name):
    for row in range(3):
        assert_same(run(name, slice(row, row + 1))[-1], plain(), (row,))


@each_example
def test_rows_end_within_a_draft_where_plain_decoding_ends_them(name):
    """At a stop token, or at a limit that only some rows have; no cache holds what comes after."""
    output = [text[length:] for text, length in zip(texts(plain()), LENGTHS, strict=True)]
    changes = {"stop_token_ids": (int(output[1][13]), int(output[2][17])), "new": np.array([11, 24, 33])}
    want = plain_decode(PARAMS, start(params=PARAMS, options=OPTIONS, **changes))
    assert np.all(np.asarray(want.length) - LENGTHS < NEW)
    assert_same(run(name, **changes)[-1], want)


@each_example
@pytest.mark.quick_cases(5)
def test_started_rows_may_be_repeated(name):
    """Each of them then goes on as if it had been started twice."""
    own, seeds = example(name), np.array([5, 6, 7], np.uint32)
    draft_params = own.draft_params
    if own.has_rows:
        draft_params = jax.tree.map(lambda leaf: leaf[:1], draft_params)
    begin, decode = compiled(own.drafter)
    state = begin(PARAMS, draft_params, start(slice(0, 1), params=PARAMS, options=OPTIONS))
    state = repeat_rows(state, seeds, decoding.speculative(MODEL, own.drafter, ExactMatch()).constrained)
    alone = repeat_rows(start(slice(0, 1), params=PARAMS, options=OPTIONS), seeds, lambda state: state)
    assert_same(decode(PARAMS, draft_params, state), plain_decode(PARAMS, alone))


@each_example
def test_weights_that_are_not_finite_change_no_token(name):
    """From the start on, and for a while: at first, and between other rounds."""
    good = example(name).draft_params
    bad = jax.tree.map(
        lambda leaf: jnp.full_like(leaf, jnp.nan) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, good
    )
    begin, decode = compiled(Watched(example(name).drafter))
    for of_start, of_rounds in ((bad, (bad,)), (bad, (bad, good)), (good, (good, bad, good))):
        state = begin(PARAMS, of_start, start(params=PARAMS, options=OPTIONS))
        for place, draft_params in enumerate(of_rounds, start=1):
            state = decode(PARAMS, draft_params, state, 7 if place < len(of_rounds) else ALL_TOKENS)
        assert_same(state, plain())


@each_example
def test_a_proposal_is_a_tree_of_the_promised_size_from_the_last_token(name):
    drafter = example(name).drafter
    node, depths = np.arange(drafter.num_nodes), set()
    for before, proposal in proposals(name):
        token, parent = proposal["token"], proposal["parent"]
        assert token.shape == (3, drafter.num_nodes)
        np.testing.assert_array_equal(token[:, 0], before.last_token())
        assert np.all((token >= 0) & (token < VOCABULARY))
        np.testing.assert_array_equal(parent[:, 0], -1)
        assert np.all((parent[:, 1:] >= 0) & (parent[:, 1:] < node[1:]))
        is_above, depth = np.zeros((3, *node.shape, *node.shape), bool), np.zeros(token.shape, int)
        for row, child in np.ndindex(token.shape):
            is_above[row, child, child] = True
            if child:
                is_above[row, child] |= is_above[row, parent[row, child]]
                depth[row, child] = depth[row, parent[row, child]] + 1
        np.testing.assert_array_equal(proposal["depth"], depth)
        np.testing.assert_array_equal(proposal["ancestors"], is_above)
        assert not np.any(proposal["is_candidate"][:, 0])
        assert np.all(depth[proposal["is_candidate"]] <= drafter.max_depth)
        assert int(proposal["num_draft_forwards"]) >= 0
        depths |= {*depth[proposal["is_candidate"]].tolist()}
    assert depths or not drafter.max_depth


@each_example
def test_candidates_that_were_drawn_come_with_their_distribution(name):
    """A distribution at every node with children that were drawn, none where they were chosen."""
    for _, proposal in proposals(name):
        if example(name).drafter.children is Children.CHOSEN:
            assert proposal["logprobs"] is None
            continue
        row, node = np.nonzero(proposal["is_candidate"])
        logprobs = proposal["logprobs"][row, proposal["parent"][row, node]].astype(np.float64)
        # Sums of 37 probabilities, each rounded at 6e-8 of its size.
        np.testing.assert_allclose(np.exp(logprobs).sum(axis=1), 1, atol=1e-5)
        assert np.all(np.isfinite(logprobs[np.arange(len(row)), proposal["token"][row, node]]))


@each_example
def test_counts_add_up(name):
    states = rounds(name)
    counts = jax.tree.map(np.asarray, states[-1].counts)
    lengths, depth = counts.accepted_lengths, example(name).drafter.max_depth
    assert len(lengths) == depth + 1 and len(counts.proposed) == len(counts.accepted) == depth
    assert lengths @ (np.arange(depth + 1) + 1) == NEW.sum()
    assert np.all(counts.accepted <= counts.proposed) and np.all(counts.proposed[1:] <= counts.accepted[:-1])
    num_rounds = len(states) - 1
    assert int(states[-1].num_target_forwards) - int(states[0].num_target_forwards) == num_rounds
    assert lengths.sum() == sum(int(np.sum(~np.asarray(before.done))) for before in states[:-1])
    # The last round of a row may be cut short by its limit; every other emitted as many tokens as its count says.
    emitted = np.array([lengths[one + 1 :].sum() for one in range(depth)], int)
    assert np.all(emitted <= counts.accepted) and np.all(counts.accepted - emitted <= 3)
    forwards = [int(proposal["num_draft_forwards"]) for _, proposal in proposals(name)]
    assert int(counts.num_draft_forwards) == sum(forwards)


@each_example
def test_it_names_auxiliary_weights_where_it_has_weights(name):
    """Its own, or those of the target's first layers, which were taught to exit early."""
    leaves = jax.tree.leaves(example(name).draft_params)
    has_weights = any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves)
    runs_layers = any(proposal["layers"] for _, proposal in proposals(name))
    said = EXAMPLES.method_of(name).auxiliary_weights
    assert bool(said) == (has_weights or runs_layers)


@each_example
def test_it_is_frozen_and_hashable(name):
    drafter, again = example(name).drafter, EXAMPLES[name](target()).drafter
    assert type(drafter) is EXAMPLES.method_of(name)
    assert drafter == again and hash(drafter) == hash(again)  # one compiled program serves both
    with pytest.raises(dataclasses.FrozenInstanceError):
        drafter.num_nodes = drafter.num_nodes + 1


@each_example
def test_a_target_that_it_was_not_made_for_is_refused(name):
    """Where it has a model or weights; a drafter without any drafts for all."""
    drafter, draft_params = example(name).drafter, example(name).draft_params
    drafter.check(MODEL, draft_params)
    fields = [getattr(drafter, field.name) for field in dataclasses.fields(drafter)]
    if draft_params is None and not any(isinstance(value, Model) for value in fields):
        drafter.check(OTHER, None)
        return
    with pytest.raises(ValueError, match=r"target|model"):
        drafter.check(OTHER, draft_params)
