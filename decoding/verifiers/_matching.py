"""Accepts draft tokens that equal the target's argmax: greedy verification, used by every lossless rule."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from decodax.decoding.drafters.contract import Proposal
from decodax.decoding.top_tokens import argmax_token
from decodax.decoding.verifiers.contract import Verdict, at_node


def follow_largest(proposal: Proposal, scores: Float32[Array, "B C V"]) -> Verdict:
    """Accepts child x of node u if x = argmax(scores[u]); the token after the last accepted node is its argmax."""
    target_token = jax.vmap(argmax_token, in_axes=1, out_axes=1)(scores)
    parent = jnp.broadcast_to(jnp.maximum(jnp.asarray(proposal.tree.parent), 0), target_token.shape)
    matches = proposal.token == jnp.take_along_axis(target_token, parent, axis=1)
    node = proposal.tree.accepted_path(matches & proposal.is_candidate)
    return Verdict(node, at_node(target_token, node))
