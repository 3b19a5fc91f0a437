"""Accepts the draft tokens that plain decoding would have emitted: at temperature 0, greedy matching.

At every node the target samples its token as plain decoding does, with the same random numbers, and a child is accepted
if it is that token. So the output is, token for token, that of plain decoding with the same seed, at any temperature
and with any sampling option, whatever the drafter does. For sampled rows this is the naive sampling of SpecInfer (arXiv
2305.09781, section 4.3). Where children are chosen, not drawn, it accepts as much as any lossless rule can: the sum of
the target's probabilities of the children. Where they are drawn from a distribution near the target's, the rejection
rules accept more.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Array, Float32

from decodax.decoding.drafters.contract import Children, Proposal
from decodax.decoding.node_random import NodeRandom
from decodax.decoding.verifiers.contract import Verdict, Verifier, follow_tokens


@dataclass(frozen=True)
class ExactMatch(Verifier):
    """Accepts child x of node u if x = argmax(logits[u] + noise of the position), the noise being 0 in greedy rows."""

    lossless: ClassVar[bool] = True
    supported_children: ClassVar[frozenset[Children]] = frozenset(Children)

    def verify(self, proposal: Proposal, logits: Float32[Array, "B C V"], rng: NodeRandom) -> Verdict:
        return follow_tokens(proposal, rng.sample(logits))
