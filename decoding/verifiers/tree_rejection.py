"""Multi-step speculative sampling: several draft tokens drawn independently for one place are tried one after another,
and the output follows the target's law exactly.

Paper: SpecInfer: Accelerating Large Language Model Serving with Tree-based Speculative Inference and Verification,
arXiv 2305.09781 (section 4.3).

The paper draws the next child to try at random among several drafters; here one drafter draws all children of a node
from one law, and they are tried in the order in which they were drawn.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.decoding.drafters._contract import Children
from decodax.decoding.verifiers._acceptance import excess, ratio
from decodax.decoding.verifiers._walk import TreeRule


@dataclass(frozen=True)
class TreeRejection(TreeRule):
    """r = p at first; child x is taken with probability min(1, r(x) / q(x)), and a refusal makes r norm(max(r - q, 0)).

    q is the draft's law at the node for every child, as each was drawn from it, those refused included. With
    r = (0.5, 0.25, 0.25) and q = (0, 0.75, 0.25), a refusal (only of token 1) leaves r = (1, 0, 0).
    """

    lossless: ClassVar[bool] = True
    takes: ClassVar[frozenset[Children]] = frozenset({Children.INDEPENDENT})

    def acceptance(
        self, wanted: Float[Array, " V"], law: Float[Array, " V"] | None, token: Int[Array, ""]
    ) -> Float[Array, ""]:
        assert law is not None
        return ratio(wanted[token], jnp.exp(law[token]))

    def refuse(
        self, wanted: Float[Array, " V"], law: Float[Array, " V"] | None, token: Int[Array, ""]
    ) -> tuple[Float[Array, " V"], Float[Array, " V"] | None]:
        assert law is not None
        return excess(wanted, jnp.exp(law)), law
