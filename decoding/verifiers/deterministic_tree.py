"""Verifies a tree of chosen (not drawn) draft tokens, such as a draft's most probable ones, by rejection sampling.

Paper: EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees, arXiv 2406.16858 (the rule is that of its
code).

The output follows the target distribution exactly. A chosen token counts as drawn from a distribution with all
probability on it, so it is accepted with the target's probability and otherwise excluded. Dividing by the draft's
probability, as rejection rules do for drawn children, would be wrong here. The rule does not depend on how the children
were found, so it holds for drawn ones too; rules that know their distribution accept more of those.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Array, Float, Int

from decodax.decoding.drafters.contract import Children
from decodax.decoding.rejection_sampling import distribution_without
from decodax.decoding.verifiers._walk import TreeRule


@dataclass(frozen=True)
class DeterministicTree(TreeRule):
    """r = p at first; child x is accepted with probability r(x), and a rejection sets r(x) = 0 and renormalises.

    So one of the children is accepted with the sum of their probabilities: with p = (0.5, 0.25, 0.25) and children 0
    and 1, the first with 0.5, and the second, after the first is rejected, with 0.25 / 0.5.
    """

    lossless: ClassVar[bool] = True
    supported_children: ClassVar[frozenset[Children]] = frozenset(Children)

    def acceptance(
        self, target_probs: Float[Array, " V"], logprobs: Float[Array, " V"] | None, token: Int[Array, ""]
    ) -> Float[Array, ""]:
        return target_probs[token]

    def reject(
        self, target_probs: Float[Array, " V"], logprobs: Float[Array, " V"] | None, token: Int[Array, ""]
    ) -> tuple[Float[Array, " V"], Float[Array, " V"] | None]:
        return distribution_without(target_probs, token), logprobs
