"""Verifies a chain by rejection sampling (speculative sampling); the output follows the target distribution exactly.

Papers: Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192; Accelerating Large Language Model
Decoding with Speculative Sampling, arXiv 2302.01318.

The first rejected draft token is replaced by a draw from the residual distribution. All draft tokens are tested at
once, as their acceptance does not depend on one another; only the first rejection matters. A draft that is chosen, not
drawn (the most probable tokens, a lookup), has a distribution with all probability on its token.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from decodax.decoding.drafters.contract import Children, Proposal
from decodax.decoding.node_random import NodeRandom
from decodax.decoding.rejection_sampling import acceptance_probability, distribution_without, residual_distribution
from decodax.decoding.verifiers.contract import Verdict, Verifier, at_node


@dataclass(frozen=True)
class ChainRejection(Verifier):
    """Accepts token x with probability min(1, p(x) / q(x)); after the first rejection, draws from norm(max(p - q, 0)).

    When all are accepted, or the draft ends, the token after them is drawn from p. A token is accepted with probability
    1 - TV(p, q): with p = (0.5, 0.25, 0.25) and q = (0, 0.75, 0.25) it is 0.5, and a rejection gives token 0.
    """

    lossless: ClassVar[bool] = True
    supported_children: ClassVar[frozenset[Children]] = frozenset(Children)
    only_chains: ClassVar[bool] = True

    def verify(self, proposal: Proposal, logits: Float32[Array, "B C V"], rng: NodeRandom) -> Verdict:
        node, probs = judge(proposal, logits, rng.uniform())
        return Verdict(node, rng.draw(node, probs))


def judge(
    proposal: Proposal, logits: Float32[Array, "B C V"], uniform: Float32[Array, "B C"]
) -> tuple[Int[Array, " B"], Float32[Array, "B V"]]:
    """The last accepted node of every row, and the distribution of the token after it."""
    is_accepted = proposal.is_candidate[:, 1:] & (
        uniform[:, 1:] < acceptance_probability(*_probabilities(proposal, logits))
    )
    node = jnp.sum(jnp.cumprod(is_accepted, axis=1, dtype=jnp.int32), axis=1, dtype=jnp.int32)
    # The nodes of a chain are numbered along it, so a rejected token, if there is one, is the next node.
    next_node = jnp.minimum(node + 1, uniform.shape[1] - 1)
    is_rejected = at_node(proposal.is_candidate, next_node) & (next_node > node)
    target_probs = jax.nn.softmax(at_node(logits, node), axis=1)
    if proposal.logprobs is None:
        residual = distribution_without(target_probs, at_node(proposal.token, next_node))
    else:
        residual = residual_distribution(target_probs, jnp.exp(at_node(proposal.logprobs, node)))
    return node, jnp.where(is_rejected[:, None], residual, target_probs)


def _probabilities(
    proposal: Proposal, logits: Float32[Array, "B C V"]
) -> tuple[Float32[Array, "B A"], Float32[Array, "B A"]]:
    """p and q of every draft token, at its parent."""
    token, logits = proposal.token[:, 1:, None], logits[:, :-1]
    target_logprobs = jnp.take_along_axis(logits, token, axis=2)[:, :, 0] - jax.nn.logsumexp(logits, axis=2)
    if proposal.logprobs is None:
        return jnp.exp(target_logprobs), jnp.ones(target_logprobs.shape, jnp.float32)
    return jnp.exp(target_logprobs), jnp.exp(jnp.take_along_axis(proposal.logprobs[:, :-1], token, axis=2)[:, :, 0])
