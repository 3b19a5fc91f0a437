"""Tries draft tokens that were drawn without replacement, so that none is tried twice; the output follows the target's
law exactly.

Papers: Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding, arXiv 2402.12374; DySpec: Faster Speculative
Decoding with Dynamic Token Tree Structure, arXiv 2410.11744.

The law of the second child is the draft's without the first one, renormalised, and so on. It is renormalised from
logarithms each time, because a peaked draft leaves so little behind its first token that float32 would make it 0.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.decoding.drafters._contract import Children
from decodax.decoding.verifiers._acceptance import excess, is_token, ratio
from decodax.decoding.verifiers._walk import TreeRule


@dataclass(frozen=True)
class TreeRejectionWithoutReplacement(TreeRule):
    """r = p and q the draft's law at first; child x is taken with probability min(1, r(x) / q(x)).

    A refusal makes r norm(max(r - q, 0)), and then q norm(q without x). With r = (0.5, 0.25, 0.25) and
    q = (0, 0.75, 0.25), a refusal (only of token 1) leaves r = (1, 0, 0) and q = (0, 0, 1).
    """

    lossless: ClassVar[bool] = True
    takes: ClassVar[frozenset[Children]] = frozenset({Children.WITHOUT_REPLACEMENT})

    def acceptance(
        self, wanted: Float[Array, " V"], law: Float[Array, " V"] | None, token: Int[Array, ""]
    ) -> Float[Array, ""]:
        assert law is not None
        return ratio(wanted[token], jax.nn.softmax(law)[token])

    def refuse(
        self, wanted: Float[Array, " V"], law: Float[Array, " V"] | None, token: Int[Array, ""]
    ) -> tuple[Float[Array, " V"], Float[Array, " V"] | None]:
        assert law is not None
        return excess(wanted, jax.nn.softmax(law)), jnp.where(is_token(token, law.shape[0]), -jnp.inf, law)
