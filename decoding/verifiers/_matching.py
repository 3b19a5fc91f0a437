"""Follows the draft as far as it says what the target says: the walk of every lossless rule where nothing is drawn."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from decodax.decoding.drafters._contract import Proposal
from decodax.decoding.logits_processors._largest import largest_token
from decodax.decoding.verifiers._contract import Verdict, at_node


def follow_largest(proposal: Proposal, scores: Float32[Array, "B C V"]) -> Verdict:
    """Accepts child x of node u if x = argmax(scores[u]); the token after the last accepted node is its argmax."""
    wanted = jax.vmap(largest_token, in_axes=1, out_axes=1)(scores)
    parent = jnp.broadcast_to(jnp.maximum(jnp.asarray(proposal.tree.parent), 0), wanted.shape)
    matches = proposal.token == jnp.take_along_axis(wanted, parent, axis=1)
    node = proposal.tree.accepted_path(matches & proposal.is_candidate)
    return Verdict(node, at_node(wanted, node))
