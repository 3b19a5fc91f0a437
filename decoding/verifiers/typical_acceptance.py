"""Accepts draft tokens that are typical for the target. Lossy: the output does not follow the target distribution.

Paper: Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads, arXiv 2401.10774 (section 2.3).

A token is typical when its probability is above a threshold that falls with the entropy of the target. The longest
path of typical tokens is accepted; the draft, not the target, decides which of the typical tokens it holds.

Departs from the paper: its first token of every round is the target's most probable, always accepted; here the token
after the accepted path is drawn as plain decoding draws it, with every sampling option, and the draft follows it. The
probabilities are those after the sampling options, so a row at temperature 0 is greedy matching.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from decodax.decoding.drafters.contract import Children, Proposal
from decodax.decoding.node_random import NodeRandom
from decodax.decoding.verifiers.contract import Verdict, Verifier, at_node


@dataclass(frozen=True)
class TypicalAcceptance(Verifier):
    """Accepts token x if p(x) > min(epsilon, delta * exp(-H)), H being the entropy of p in nats.

    Of the accepted paths the longest is taken, of equally long ones the most probable. The paper sets delta to the
    square root of epsilon. With p = (0.5, 0.25, 0.25), H = 1.04 and exp(-H) = 0.354: the defaults accept above
    min(0.09, 0.106). With epsilon 1 and delta infinite nothing is accepted, which is plain decoding.

    Raises ValueError where epsilon is not in 0..1 or delta is not above 0.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    lossless: ClassVar[bool] = False
    supported_children: ClassVar[frozenset[Children]] = frozenset(Children)

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 1:
            raise ValueError(
                f"epsilon must be above 0 and at most 1 (a probability above which every token passes), got "
                f"{self.epsilon}: the paper's is 0.09, higher ones accept less"
            )
        if not self.delta > 0:
            raise ValueError(
                f"delta must be above 0 (it scales exp(-entropy)), got {self.delta}: the paper's is the square root of "
                f"epsilon, here {math.sqrt(self.epsilon):.3g}"
            )

    def verify(self, proposal: Proposal, logits: Float32[Array, "B C V"], rng: NodeRandom) -> Verdict:
        log_p = jax.nn.log_softmax(logits, axis=2)
        entropy = -jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0), axis=2)
        threshold = jnp.minimum(self.epsilon, self.delta * jnp.exp(-entropy))
        parent, row = proposal.parent, jnp.arange(logits.shape[0])[:, None]
        of_token = log_p[row, parent, proposal.token]
        is_typical = jnp.exp(of_token) > jnp.take_along_axis(threshold, parent, axis=1)
        node = _best_path(proposal, is_typical & proposal.is_candidate, of_token)
        return Verdict(node, rng.draw(node, jnp.exp(at_node(log_p, node))))


def _best_path(
    proposal: Proposal, accepted: Bool[Array, "B C"], log_probability: Float32[Array, "B C"]
) -> Int[Array, " B"]:
    """The end of the longest path whose every node is accepted; of equally long ones the most probable."""
    depth = jnp.broadcast_to(jnp.asarray(proposal.tree.depth), accepted.shape)
    after_root = jnp.asarray(proposal.tree.ancestors) & (jnp.asarray(proposal.tree.depth) > 0)[:, None, :]
    passed = jnp.where(accepted, log_probability, -jnp.inf)
    score = jnp.sum(jnp.where(after_root, passed[:, None, :], 0), axis=2)
    longest = jnp.max(jnp.where(score > -jnp.inf, depth, 0), axis=1, keepdims=True)
    return jnp.argmax(jnp.where(depth == longest, score, -jnp.inf), axis=1).astype(jnp.int32)
