"""Accepts draft tokens that the target finds typical enough. Lossy: the output does not follow the target's law.

Paper: Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads, arXiv 2401.10774 (section 2.3).

A token counts as typical when its probability is above a threshold that falls where the target is unsure. The longest
path of typical tokens is accepted, and the draft, not the target, has decided which of the typical tokens it holds.

What departs from the paper: its first token of every round is the target's likeliest, accepted without a question;
here the token after the accepted path is drawn as plain decoding draws it, with every sampling option, and the draft
follows it. The probabilities are those after the sampling options, so a row at temperature 0 is greedy matching.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, UInt32

from decodax.decoding.drafters._contract import Children, Proposal
from decodax.decoding.verifiers._acceptance import draw_after
from decodax.decoding.verifiers._contract import Verdict, Verifier, at_node
from decodax.decoding.verifiers._matching import follow_largest


@dataclass(frozen=True)
class TypicalAcceptance(Verifier):
    """Accepts token x if p(x) > min(epsilon, delta * exp(-H)), H being the entropy of p in nats.

    Of accepted paths the longest counts, of equally long ones the most probable. The paper sets delta to the square
    root of epsilon. With p = (0.5, 0.25, 0.25), H = 1.04 and exp(-H) = 0.354: the defaults accept above
    min(0.09, 0.106). With epsilon 1 and delta infinite nothing passes, which is plain decoding.
    Raises ValueError where epsilon is not in 0..1 or delta not above 0.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    lossless: ClassVar[bool] = False
    takes: ClassVar[frozenset[Children]] = frozenset(Children)

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
        log_p = jax.nn.log_softmax(logits, axis=2)
        entropy = -jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0), axis=2)
        threshold = jnp.minimum(self.epsilon, self.delta * jnp.exp(-entropy))
        tree = proposal.tree
        parent = jnp.broadcast_to(jnp.maximum(jnp.asarray(tree.parent), 0), proposal.token.shape)
        row = jnp.arange(parent.shape[0])[:, None]
        of_token = log_p[row, parent, proposal.token]
        is_typical = jnp.exp(of_token) > jnp.take_along_axis(threshold, parent, axis=1)
        node = _best_path(proposal, is_typical & proposal.is_candidate, of_token)
        return draw_after(node, jnp.exp(at_node(log_p, node)), seed, position)


def _best_path(
    proposal: Proposal, accepted: Bool[Array, "B C"], log_probability: Float32[Array, "B C"]
) -> Int[Array, " B"]:
    """The end of the longest path whose every node is accepted, of equally long ones that of the most probable."""
    depth = jnp.broadcast_to(jnp.asarray(proposal.tree.depth), accepted.shape)
    behind_root = jnp.asarray(proposal.tree.ancestors) & (jnp.asarray(proposal.tree.depth) > 0)[:, None, :]
    passed = jnp.where(accepted, log_probability, -jnp.inf)
    score = jnp.sum(jnp.where(behind_root, passed[:, None, :], 0), axis=2)
    longest = jnp.max(jnp.where(score > -jnp.inf, depth, 0), axis=1, keepdims=True)
    return jnp.argmax(jnp.where(depth == longest, score, -jnp.inf), axis=1).astype(jnp.int32)
