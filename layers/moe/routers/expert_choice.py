"""Implements expert choice routing: each expert selects the same number of tokens, those with its highest scores.

Mixture-of-Experts with Expert Choice Routing, arXiv 2202.09368. No expert is idle or overloaded. A
token may get several experts, or none.

Not causal: whether an expert selects a token depends on the tokens after it, so a prefill in one piece and the same
prompt token by token give different results. It is for encoders and for research, not for decoding.

Departs from the paper: experts choose within one row and not among all rows, so that a row's result does not depend on
the others. NaN scores are never selected.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decodax.core.weight import Weight
from decodax.layers.moe.routers._logits import router_logits
from decodax.layers.moe.routes import Routes


@dataclass(frozen=True)
class ExpertChoice:
    """S = softmax(x W^T) over experts; expert e selects the c tokens with the highest S[:, e], with S as their gates.

    c = T * experts_per_token / E, rounded up, at most T. As routes, a token has E choices; choice e is expert e or -1.

    num_experts: E.
    experts_per_token: the mean over tokens (the paper's capacity factor).
    """

    num_experts: int
    experts_per_token: float

    def __post_init__(self) -> None:
        if self.num_experts < 1 or not 0 < self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token must be above 0 and at most num_experts = {self.num_experts}, got "
                f"{self.experts_per_token}"
            )

    def weights(self, hidden_size: int) -> dict[str, Weight]:
        return {"weight": Weight(("E", "D"), (self.num_experts, hidden_size), replicated=True)}

    def route(self, tokens: Float[Array, "B T D"], weights: dict[str, Any]) -> Routes:
        num_tokens = tokens.shape[1]
        num_selected = min(num_tokens, math.ceil(num_tokens * self.experts_per_token / self.num_experts))
        scores = jax.nn.softmax(router_logits(tokens, weights), axis=-1)
        by_expert = jnp.moveaxis(jnp.where(jnp.isnan(scores), -1.0, scores), 1, 2)
        best, selected = jax.lax.top_k(by_expert, num_selected)  # [B, E, c]
        at_token = (selected[..., None] == jnp.arange(num_tokens)[None, None, None, :]) & (best[..., None] >= 0)
        is_selected = jnp.moveaxis(jnp.any(at_token, axis=2), 1, 2)
        expert = jnp.where(is_selected, jnp.arange(self.num_experts)[None, None, :], -1)
        return Routes.of(expert, jnp.where(is_selected, scores, 0.0))
