"""Drafters, verifiers and proposals of one's own that break the contract are refused in one line, or made harmless."""

import copy
import dataclasses
import inspect
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.decoding import speculative
from decodax.decoding.drafters import (
    Children,
    Drafter,
    HintedProposal,
    LayerProposal,
    NoDraft,
    PromptLookup,
    fixed_proposal,
)
from decodax.decoding.tree import Tree
from decodax.decoding.verifiers import ChainRejection, ExactMatch, Verifier
from tests.speculation import MODEL, PARAMS, plain, start

NODES, WIDTH = 3, MODEL.config.hidden_size


def changed(proposal, **fields):
    """The proposal with other fields, which no annotation checks, as outside these tests."""
    other = copy.copy(proposal)
    for name, value in fields.items():
        object.__setattr__(other, name, value)
    return other


def updates(num_nodes=NODES):
    """Empty cache updates of both layers."""
    return MODEL.empty_update(3, num_nodes, jnp.float32)


def layered(proposal, **fields):
    """The proposal of a drafter that says that it ran the first layers."""
    return changed(LayerProposal.extend(proposal, jnp.zeros((3, NODES, WIDTH))), **fields)


def hinted(proposal, likely):
    return changed(HintedProposal.extend(proposal, jnp.zeros((3, NODES, 2), jnp.int32)), likely=likely)


@dataclass(frozen=True)
class Always(Drafter):
    """Always drafts the same two tokens, changed by `change`: a name of CHANGES."""

    change: str = ""
    num_nodes: int = NODES
    max_depth: int = NODES - 1
    children: Children = Children.CHOSEN

    def propose(self, params, draft_params, state):
        token = jnp.broadcast_to(jnp.asarray([9, 5, 7], jnp.int32), (state.tokens.shape[0], NODES))
        token = token.at[:, 0].set(state.last_token())
        proposal = fixed_proposal(Tree.chain(NODES), token, jnp.ones(token.shape, bool))
        return CHANGES[self.change](proposal) if self.change else (proposal, ())


CHANGES = {
    "no state": lambda proposal: proposal,
    "a list": lambda proposal: [proposal, ()],
    "floats": lambda proposal: (changed(proposal, token=proposal.token.astype(jnp.float32)), ()),
    "no rows": lambda proposal: (changed(proposal, token=proposal.token[0]), ()),
    "fewer tokens": lambda proposal: (changed(proposal, token=proposal.token[:, 1:]), ()),
    "numbers for candidates": lambda proposal: (changed(proposal, is_candidate=proposal.token), ()),
    "another tree": lambda proposal: (changed(proposal, tree=Tree.chain(NODES + 1)), ()),
    "another first token": lambda proposal: (changed(proposal, token=proposal.token.at[:, 0].set(3)), ()),
    "other hidden states": lambda proposal: (
        changed(LayerProposal.extend(proposal, jnp.zeros((3, NODES, 4))), hidden=jnp.zeros((3, 4))),
        (),
    ),
    "whole hidden states": lambda proposal: (
        layered(proposal, hidden=jnp.zeros((3, NODES, WIDTH), jnp.int32)),
        (),
    ),
    "updates of fewer nodes": lambda proposal: (layered(proposal, cache_updates=updates(1)[:1]), ()),
    "updates of a kind of their own": lambda proposal: (layered(proposal, cache_updates=(np.zeros(3),)), ()),
    "more updates than layers": lambda proposal: (layered(proposal, cache_updates=updates() * 2), ()),
    "a first layer and one update": lambda proposal: (
        layered(proposal, cache_updates=updates()[:1], first_layer=jnp.int32(1)),
        (),
    ),
    "a first layer for each row": lambda proposal: (
        layered(proposal, cache_updates=updates(), first_layer=jnp.ones(3, jnp.int32)),
        (),
    ),
    "layers of half a row": lambda proposal: (layered(proposal, row_layers=jnp.ones(2, jnp.int32)), ()),
    "layers in floats": lambda proposal: (layered(proposal, layers_run=jnp.float32(1)), ()),
    "forwards for each row": lambda proposal: (changed(proposal, num_draft_forwards=jnp.ones(3, jnp.int32)), ()),
    "likely tokens in floats": lambda proposal: (hinted(proposal, jnp.zeros((3, NODES, 2))), ()),
    "likely tokens of no node": lambda proposal: (hinted(proposal, jnp.zeros((3, 3), jnp.int32)), ()),
    "unknown tokens": lambda proposal: (
        changed(proposal, token=proposal.token.at[:, 1:].set(jnp.asarray([-4, 99]))),
        (),
    ),
}


def decode(drafter, verifier=None, **options):
    run = speculative(MODEL, drafter, ExactMatch() if verifier is None else verifier)
    return jax.jit(run)(PARAMS, None, start(**options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no state", "Always.propose must return a Proposal and the drafter's state, got "),
        ("a list", "Always.propose must return a Proposal and the drafter's state, got "),
        (
            "floats",
            r"token of Always.propose must be integer of shape \(3, 3\) \(rows, num_nodes\), got float32 of shape",
        ),
        ("no rows", r"got int32 of shape \(3,\)"),
        ("fewer tokens", r"token of Always.propose must be .* got int32 of shape \(3, 2\)"),
        ("numbers for candidates", r"is_candidate of Always.propose must be bool.* got int32 of shape \(3, 3\)"),
        (
            "other hidden states",
            r"hidden of Always.propose must be floating of shape \(3, 3, \d+\) .* got float32",
        ),
        ("whole hidden states", r"hidden of Always.propose must be floating of shape .*, got int32 of shape"),
        (
            "updates of fewer nodes",
            r"cache_updates\[0\] of Always.propose must be that layer's for 3 rows of 3 nodes",
        ),
        ("updates of a kind of their own", r"cache_updates\[0\] of Always.propose .*, got ndarray with \[3\]"),
        (
            "more updates than layers",
            "cache_updates of .* must be one for each layer run, at most 2, got 4",
        ),
        ("a first layer and one update", "must be one for each layer run, 2, as first_layer is given, got 1"),
        (
            "a first layer for each row",
            r"first_layer of .* must be integer of shape \(\), got int32 of shape",
        ),
        (
            "layers of half a row",
            r"row_layers of .* must be integer of shape \(3,\) \(rows\), got .* \(2,\)",
        ),
        ("layers in floats", r"layers_run of Always.propose must be integer of shape \(\), got float32"),
        ("forwards for each row", r"num_draft_forwards of Always.propose must be integer of shape \(\), got int32 of"),
        ("likely tokens in floats", r"likely of Always.propose must be integer of shape \(3, 3, any\) .*, got float32"),
        (
            "likely tokens of no node",
            r"likely of .* must be integer of shape .*, got int32 of shape \(3, 3\)",
        ),
        ("another tree", "the tree of Always.propose must have Always.num_nodes = 3 nodes, got 4"),
    ],
)
def test_proposals_that_break_the_contract_are_refused(change, message):
    """At the first trace, before anything is compiled."""
    run = speculative(MODEL, Always(change), ExactMatch())
    with pytest.raises(ValueError, match=message.replace("\\\\", "\\")):
        jax.eval_shape(run, PARAMS, None, start())


def test_drawn_children_need_their_distribution_where_a_row_is_sampled():
    drawn = Always(children=Children.INDEPENDENT)
    run = speculative(MODEL, drawn, ChainRejection())
    jax.eval_shape(run, PARAMS, None, start())
    with pytest.raises(
        ValueError, match=r"logprobs of Always.propose .* of shape \(3, 3, 37\) .* is sampled, got None"
    ):
        jax.eval_shape(run, PARAMS, None, start(options="sampled"))


@pytest.mark.parametrize("change", ["another first token", "unknown tokens"])
def test_what_a_trace_cannot_know_changes_no_token(change):
    np.testing.assert_array_equal(decode(Always(change)).tokens, plain().tokens)


@dataclass(frozen=True)
class GreedyOnly(Verifier):
    """A verifier that does not say what it accepts of sampled rows."""

    lossless = True
    supported_children = frozenset(Children)


def test_a_verifier_without_a_rule_for_sampled_rows_is_refused_for_them():
    decode(PromptLookup(2), GreedyOnly())
    with pytest.raises(ValueError, match=r"GreedyOnly verifies greedy rows only .* temperature above 0: set it to 0"):
        decode(PromptLookup(2), GreedyOnly(), options="sampled")


class Silent(Verifier):
    """A verifier that does not say what it supports."""

    lossless = True


class Unfinished(Drafter):
    """A drafter without sizes."""


@pytest.mark.parametrize(
    ("drafter", "verifier", "message"),
    [
        (ExactMatch(), PromptLookup(3), r"the drafter must be a Drafter \(subclass it\), got ExactMatch"),
        (NoDraft(), NoDraft(), r"the verifier must be a Verifier \(subclass it\), got NoDraft"),
        (NoDraft(), Silent(), "Silent.supported_children must be a frozenset of Children, got None"),
        (Unfinished(), ExactMatch(), "Unfinished.num_nodes must be a whole number of at least 1, got None"),
        (Always(num_nodes=0), ExactMatch(), "Always.num_nodes must be a whole number of at least 1, got 0"),
        (Always(max_depth=-1), ExactMatch(), "Always.max_depth must be a whole number of at least 0, got -1"),
    ],
)
def test_pairs_that_are_none_are_refused_where_they_are_made(drafter, verifier, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(speculative)(MODEL, drafter, verifier)  # outside tests annotations are not checked


def test_a_state_goes_on_only_with_the_drafter_that_started_it():
    run, other = (speculative(MODEL, drafter, ExactMatch()) for drafter in (PromptLookup(3), PromptLookup(4)))
    begun = jax.jit(run.start)(PARAMS, None, start())
    jax.eval_shape(run, PARAMS, None, begun)
    message = r"started by PromptLookup \(4 nodes, depth 3\), and cannot go on with PromptLookup \(5 nodes, depth 4\)"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(other, PARAMS, None, begun)
    jax.eval_shape(other, PARAMS, None, dataclasses.replace(begun, draft=None))
    careful = speculative(MODEL, PromptLookup(3, max_ngram=2), ExactMatch())  # other settings of the same drafter
    jax.eval_shape(careful, PARAMS, None, begun)


@pytest.mark.parametrize(
    ("kept", "message"), [(None, "got None"), (jnp.zeros(3), r"got .*0., 0."), ((1, 2), r"got \(1, 2\)")]
)
def test_a_state_of_another_form_is_refused(kept, message):
    class Forgetful(Always):
        def update(self, params, draft_params, state, outcome):
            return kept

    with pytest.raises(ValueError, match=rf"Forgetful.update must return the drafter's state .*, \(\), {message}"):
        jax.eval_shape(speculative(MODEL, Forgetful(), ExactMatch()), PARAMS, None, start())
