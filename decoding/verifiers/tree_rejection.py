"""Verifies a tree of independently drawn siblings, tried one after another (multi-step speculative sampling).

Paper: SpecInfer: Accelerating Large Language Model Serving with Tree-based Speculative Inference and Verification,
arXiv 2305.09781 (section 4.3).

The output follows the target distribution exactly. The paper picks the next child to try at random among several
drafters; here one drafter draws all children of a node from one distribution, and they are tried in the order in which
they were drawn.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.decoding.drafters.contract import Children
from decodax.decoding.rejection_sampling import acceptance_probability, residual_distribution
from decodax.decoding.verifiers._walk import TreeRule


@dataclass(frozen=True)
class TreeRejection(TreeRule):
    """r = p at first; child x is accepted with probability min(1, r(x) / q(x)).

    A rejection sets r = norm(max(r - q, 0)). q is the draft's distribution at the node for every child, as each was
    drawn from it, rejected ones included. With r = (0.5, 0.25, 0.25) and q = (0, 0.75, 0.25), a rejection (only of
    token 1) leaves r = (1, 0, 0).
    """

    lossless: ClassVar[bool] = True
    supported_children: ClassVar[frozenset[Children]] = frozenset({Children.INDEPENDENT})

    def acceptance(
        self, target_probs: Float[Array, " V"], logprobs: Float[Array, " V"] | None, token: Int[Array, ""]
    ) -> Float[Array, ""]:
        assert logprobs is not None
        return acceptance_probability(target_probs[token], jnp.exp(logprobs[token]))

    def reject(
        self, target_probs: Float[Array, " V"], logprobs: Float[Array, " V"] | None, token: Int[Array, ""]
    ) -> tuple[Float[Array, " V"], Float[Array, " V"] | None]:
        assert logprobs is not None
        return residual_distribution(target_probs, jnp.exp(logprobs)), logprobs
