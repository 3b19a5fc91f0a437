"""Speculative sampling on a chain: draft tokens stand while the target finds them likely enough, the first that does
not is replaced by a draw from what the draft had missed, and the output follows the target's law exactly.

Papers: Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192; Accelerating Large Language Model
Decoding with Speculative Sampling, arXiv 2302.01318.

All draft tokens are judged at once, as whether one would be taken depends on no other; only the first refusal matters.
A draft that is chosen and not drawn (the likeliest tokens, a lookup) has all its law's probability on its token.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, UInt32

from decodax.decoding.drafters._contract import Children, Proposal
from decodax.decoding.verifiers._acceptance import acceptance_draws, draw_after, excess, ratio, without
from decodax.decoding.verifiers._contract import Verdict, Verifier, at_node
from decodax.decoding.verifiers._matching import follow_largest


@dataclass(frozen=True)
class ChainRejection(Verifier):
    """Takes token x with probability min(1, p(x) / q(x)); after the first refusal, a draw from norm(max(p - q, 0)).

    When all are taken, or the draft ends, the token after them is drawn from p. The probability of taking a token is
    1 - TV(p, q): with p = (0.5, 0.25, 0.25) and q = (0, 0.75, 0.25) it is 0.5, and a refusal gives token 0.
    """

    lossless: ClassVar[bool] = True
    takes: ClassVar[frozenset[Children]] = frozenset(Children)
    only_chains: ClassVar[bool] = True

    def verify(
        self,
        proposal: Proposal,
        logits: Float32[Array, "B C V"],
        draws: bool,
        seed: UInt32[Array, " B"],
        position: Int[Array, "B C"],
    ) -> Verdict:
        if not draws:
            return follow_largest(proposal, logits)
        return draw_after(*judge(proposal, logits, acceptance_draws(proposal, seed, position)), seed, position)


def judge(
    proposal: Proposal, logits: Float32[Array, "B C V"], uniform: Float32[Array, "B C"]
) -> tuple[Int[Array, " B"], Float32[Array, "B V"]]:
    """The last node taken in every row, and the law of the token after it."""
    is_taken = proposal.is_candidate[:, 1:] & (uniform[:, 1:] < ratio(*_probabilities(proposal, logits)))
    node = jnp.sum(jnp.cumprod(is_taken, axis=1, dtype=jnp.int32), axis=1, dtype=jnp.int32)
    # The nodes of a chain are numbered along it, so the token refused, if there is one, stands right behind.
    behind = jnp.minimum(node + 1, uniform.shape[1] - 1)
    is_refused = at_node(proposal.is_candidate, behind) & (behind > node)
    wanted = jax.nn.softmax(at_node(logits, node), axis=1)
    if proposal.law is None:
        left = without(wanted, at_node(proposal.token, behind))
    else:
        left = excess(wanted, jnp.exp(at_node(proposal.law, node)))
    return node, jnp.where(is_refused[:, None], left, wanted)


def _probabilities(
    proposal: Proposal, logits: Float32[Array, "B C V"]
) -> tuple[Float32[Array, "B A"], Float32[Array, "B A"]]:
    """p and q of every draft token, where it was drafted."""
    token, logits = proposal.token[:, 1:, None], logits[:, :-1]
    wanted = jnp.take_along_axis(logits, token, axis=2)[:, :, 0] - jax.nn.logsumexp(logits, axis=2)
    if proposal.law is None:
        return jnp.exp(wanted), jnp.ones(wanted.shape, jnp.float32)
    return jnp.exp(wanted), jnp.exp(jnp.take_along_axis(proposal.law[:, :-1], token, axis=2)[:, :, 0])
