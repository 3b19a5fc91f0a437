"""Tries draft tokens that were chosen and not drawn, such as the draft's likeliest; the output follows the target's law
exactly.

Paper: EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees, arXiv 2406.16858 (the rule is that of its
code).

A chosen token is one drawn from a law that has all its probability on it, so it is taken with the target's probability
and else ruled out. Dividing by the draft's probability, as rejection rules do for drawn children, would be wrong here.
The rule asks nothing of how the children came about, so it holds for drawn ones too; rules that know the law from which
they were drawn accept more of those.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Array, Float, Int

from decodax.decoding.drafters._contract import Children
from decodax.decoding.verifiers._acceptance import without
from decodax.decoding.verifiers._walk import TreeRule


@dataclass(frozen=True)
class DeterministicTree(TreeRule):
    """r = p at first; child x is taken with probability r(x), and a refusal makes r(x) = 0 and renormalises.

    So one of the children is taken with the sum of their probabilities: with p = (0.5, 0.25, 0.25) and children 0 and
    1, the first with 0.5, the second, once it is refused, with 0.25 / 0.5.
    """

    lossless: ClassVar[bool] = True
    takes: ClassVar[frozenset[Children]] = frozenset(Children)

    def acceptance(
        self, wanted: Float[Array, " V"], law: Float[Array, " V"] | None, token: Int[Array, ""]
    ) -> Float[Array, ""]:
        return wanted[token]

    def refuse(
        self, wanted: Float[Array, " V"], law: Float[Array, " V"] | None, token: Int[Array, ""]
    ) -> tuple[Float[Array, " V"], Float[Array, " V"] | None]:
        return without(wanted, token), law
