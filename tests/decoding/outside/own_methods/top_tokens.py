"""A verifier: a sampled row accepts any draft token among the target's most probable ones. Lossy."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from decodax.decoding.drafters import Children
from decodax.decoding.verifiers import Verdict, Verifier, at_node


@dataclass(frozen=True)
class AmongTopTokens(Verifier):
    """Accepts a draft token that is among the `count` most probable; then a token drawn from the target.

    A greedy row has all its probability on one token, and accepts no other.
    """

    count: int = 3
    lossless = False
    supported_children = frozenset(Children)

    def verify(self, proposal, logits, rng):
        least = jax.lax.top_k(logits, self.count)[0][..., -1:]
        is_top = (logits >= least) & jnp.isfinite(logits)
        after_parent = jnp.take_along_axis(is_top, proposal.parent[..., None], axis=1)
        accepted = jnp.take_along_axis(after_parent, proposal.token[..., None], axis=2)[..., 0]
        node = proposal.tree.accepted_path(accepted & proposal.is_candidate)
        return Verdict(node, rng.draw(node, jax.nn.softmax(at_node(logits, node), axis=1)))
