"""Verifies a tree of siblings drawn without replacement, so that no token is tried twice, by rejection sampling.

Papers: Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding, arXiv 2402.12374; DySpec: Faster Speculative
Decoding with Dynamic Token Tree Structure, arXiv 2410.11744.

The output follows the target distribution exactly. The second child's distribution is the draft's without the first
one, renormalised, and so on. It is renormalised from logarithms each time, because a peaked draft leaves so little
probability after its first token that float32 would round it to 0.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.decoding.drafters.contract import Children
from decodax.decoding.rejection_sampling import acceptance_probability, is_token, residual_distribution
from decodax.decoding.verifiers._walk import TreeRule


@dataclass(frozen=True)
class TreeRejectionWithoutReplacement(TreeRule):
    """r = p and q the draft's distribution at first; child x is accepted with probability min(1, r(x) / q(x)).

    A rejection sets r = norm(max(r - q, 0)), and then q = norm(q without x). With r = (0.5, 0.25, 0.25) and
    q = (0, 0.75, 0.25), a rejection (only of token 1) leaves r = (1, 0, 0) and q = (0, 0, 1).
    """

    lossless: ClassVar[bool] = True
    supported_children: ClassVar[frozenset[Children]] = frozenset({Children.WITHOUT_REPLACEMENT})

    def acceptance(
        self, target_probs: Float[Array, " V"], logprobs: Float[Array, " V"] | None, token: Int[Array, ""]
    ) -> Float[Array, ""]:
        assert logprobs is not None
        return acceptance_probability(target_probs[token], jax.nn.softmax(logprobs)[token])

    def reject(
        self, target_probs: Float[Array, " V"], logprobs: Float[Array, " V"] | None, token: Int[Array, ""]
    ) -> tuple[Float[Array, " V"], Float[Array, " V"] | None]:
        assert logprobs is not None
        return residual_distribution(target_probs, jax.nn.softmax(logprobs)), jnp.where(
            is_token(token, logprobs.shape[0]), -jnp.inf, logprobs
        )
