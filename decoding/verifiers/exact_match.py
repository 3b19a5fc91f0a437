"""Accepts the draft tokens that plain decoding would have emitted: at temperature 0, greedy matching.

At every node the target takes its token as plain decoding does, with the same random numbers, and the walk goes on
while a draft token is that very one. So the output is, token for token, that of plain decoding with the same seed, at
any temperature and with any sampling option, whatever the drafter does. For sampled rows this is the naive sampling
of SpecInfer (arXiv 2305.09781, section 4.3). Where children are chosen and not drawn it accepts as much as any lossless
rule can, the sum of the target's probabilities of the children; where they are drawn from a law near the target's, the
rejection rules accept more.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, UInt32

from decodax.decoding.drafters._contract import Children, Proposal
from decodax.decoding.logits_processors._largest import largest_token
from decodax.decoding.verifiers._contract import Verdict, Verifier, at_node, token_noise


@dataclass(frozen=True)
class ExactMatch(Verifier):
    """Accepts child x of node u if x = argmax(logits[u] + noise of the position), the noise being 0 in greedy rows."""

    lossless: ClassVar[bool] = True
    takes: ClassVar[frozenset[Children]] = frozenset(Children)

    def verify(
        self,
        proposal: Proposal,
        logits: Float32[Array, "B C V"],
        draws: bool,
        seed: UInt32[Array, " B"],
        position: Int[Array, "B C"],
    ) -> Verdict:
        if draws:
            logits = logits + token_noise(seed, position, logits.shape[2])
        wanted = jax.vmap(largest_token, in_axes=1, out_axes=1)(logits)
        parent = jnp.broadcast_to(jnp.maximum(jnp.asarray(proposal.tree.parent), 0), wanted.shape)
        matches = proposal.token == jnp.take_along_axis(wanted, parent, axis=1)
        node = proposal.tree.accepted_path(matches & proposal.is_candidate)
        return Verdict(node, at_node(wanted, node))
