"""Checks what a drafter, a verifier and a proposal of one's own give, while the loop is traced: nothing runs for it.

What a trace cannot know is made harmless: the root of a proposal is the row's last token whatever a drafter put there,
and a draft token that is not in the vocabulary is no candidate.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from decodax.core.arguments import shown
from decodax.core.array_check import check_array
from decodax.decoding.drafters.contract import Children, Drafter, Proposal
from decodax.decoding.state import DecodeState
from decodax.decoding.verifiers.contract import Verifier
from decodax.decoding.wider_proposal_check import check_wider
from decodax.models.model import Model

_VERIFIER_FACTS = (("supported_children", frozenset, "a frozenset of Children"), ("lossless", bool, "True or False"))
_SIZES = {"num_nodes": 1, "max_depth": 0}


def check_pair(drafter: Any, verifier: Any) -> None:
    """Raises ValueError where one of them lacks what the contract asks for, or they do not suit each other.

    They suit where the verifier preserves the target distribution for this drafter's proposals.
    """
    for name, given, kind in (("drafter", drafter, Drafter), ("verifier", verifier, Verifier)):
        if not isinstance(given, kind):
            raise ValueError(f"the {name} must be a {kind.__name__} (subclass it), got {shown(given)}")
    for name, least in _SIZES.items():
        size = getattr(drafter, name, None)
        if not isinstance(size, int) or size < least:
            raise ValueError(f"{_name(drafter)}.{name} must be a whole number of at least {least}, got {shown(size)}")
    if not isinstance(drafter.children, Children):
        raise ValueError(f"{_name(drafter)}.children must be one of Children, got {shown(drafter.children)}")
    for name, kind, expected in _VERIFIER_FACTS:
        fact = getattr(verifier, name, None)
        if not isinstance(fact, kind):
            raise ValueError(f"{_name(verifier)}.{name} must be {expected}, got {shown(fact)}")
    if drafter.children not in verifier.supported_children:
        supported = " or ".join(sorted(kind.value for kind in verifier.supported_children))
        raise ValueError(
            f"{_name(verifier)} preserves the target distribution only for children that are {supported}, and those of "
            f"{_name(drafter)} are {drafter.children.value}: choose another verifier (ExactMatch takes all)"
        )
    if verifier.only_chains and drafter.num_nodes != drafter.max_depth + 1:
        raise ValueError(
            f"{_name(verifier)} verifies chains, and {_name(drafter)} drafts a tree of {drafter.num_nodes} nodes and "
            f"depth {drafter.max_depth}: choose a verifier for trees"
        )


def checked_proposal(drafter: Drafter, proposed: Any, state: DecodeState, model: Model) -> tuple[Proposal, Any]:
    """What `drafter.propose` gave: the proposal and the drafter's state.

    Raises ValueError, with the field, what it must be and what it is, for a proposal that breaks the contract.
    """
    name = f"{_name(drafter)}.propose"
    if not isinstance(proposed, tuple) or len(proposed) != 2 or not isinstance(proposed[0], Proposal):
        raise ValueError(f"{name} must return a Proposal and the drafter's state, got {shown(proposed)}")
    proposal, draft = proposed
    shape, vocab_size = (state.tokens.shape[0], drafter.num_nodes), model.vocab_size
    check_array(f"token of {name}", proposal.token, shape, jnp.integer, "rows, num_nodes")
    check_array(f"is_candidate of {name}", proposal.is_candidate, shape, jnp.bool_, "rows, num_nodes")
    if proposal.tree.num_nodes != drafter.num_nodes:
        raise ValueError(
            f"the tree of {name} must have {_name(drafter)}.num_nodes = {drafter.num_nodes} nodes, got "
            f"{proposal.tree.num_nodes}"
        )
    check_array(f"num_draft_forwards of {name}", proposal.num_draft_forwards, (), jnp.integer)
    check_wider(name, proposal, shape, model)
    logprobs = proposal.logprobs
    if drafter.children is not Children.CHOSEN and state.sampling.do_sample:
        found = None if logprobs is None else logprobs.shape
        if found != (*shape, vocab_size):
            raise ValueError(
                f"logprobs of {name} must be the distributions of shape {(*shape, vocab_size)} from which its children "
                f"({drafter.children.value}) are drawn, where a row is sampled, got {found}"
            )
    is_known = (proposal.token >= 0) & (proposal.token < vocab_size)
    token = jnp.where(is_known, proposal.token, 0).at[:, 0].set(state.last_token())
    return replace(proposal, token=token, is_candidate=proposal.is_candidate & is_known), draft


def check_kept(drafter: Drafter, before: Any, after: Any) -> None:
    """Raises ValueError where `drafter.update` gave a state of another form than the one before the round."""
    kinds = [jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), state) for state in (before, after)]
    if jax.tree.structure(before) != jax.tree.structure(after) or kinds[0] != kinds[1]:
        raise ValueError(
            f"{_name(drafter)}.update must return the drafter's state in the form in which `start` made it, "
            f"{shown(before)}, got {shown(after)}"
        )


def describe(drafter: Drafter) -> str:
    """The kind and the sizes of a drafter, on which its state depends."""
    return f"{_name(drafter)} ({drafter.num_nodes} nodes, depth {drafter.max_depth})"


def _name(given: Any) -> str:
    return type(given).__name__
