"""Implements top-k routing: each token gets its highest-scoring experts, in some models from a few groups only.

Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer, arXiv 1701.06538. The options cover
the differences between published models:

- Mixtral, Qwen3-MoE, gpt-oss: softmax, renormalised. A softmax over the chosen logits alone, as the last and Granite
  write it, is the same.
- OLMoE, DeepSeekMoE: softmax, gates as they are.
- Gemma 4: softmax of scaled logits, renormalised, and a learned factor per expert.
- DeepSeek-V2: softmax, only from the groups with the highest maxima.
- DeepSeek-V3: sigmoid; chosen by score plus a bias, from the groups with the largest sum of their two highest;
  the gates are the scores without the bias, renormalised and scaled.

Departs from Shazeer et al.: no noise, which is for training. Among equal scores the expert with the lowest number wins.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from decodax.core.weight import Weight
from decodax.layers.moe.routers._logits import router_logits
from decodax.layers.moe.routes import Routes

_LEAST_SUM = 1e-20  # DeepSeek's, added to a divisor: sigmoids may all be 0


@dataclass(frozen=True)
class TopK:
    """The config of a top-k router.

    num_experts: E.
    experts_per_token: X.
    score: of all experts, from the router's logits; the gate of a chosen expert.
    renormalise: gates are divided by the sum of the chosen experts' gates.
    scale: multiplies gates.
    selection_bias: a learned bias is added to the scores for the choice alone.
    router_bias: a learned bias is added to the logits.
    logit_scale: multiplies the logits.
    expert_scale: a learned factor per expert multiplies its gate.
    num_groups: equal groups of neighbouring experts; None for no groups.
    num_groups_kept: groups with the highest `group_score`, whose experts can be chosen.
    group_score: a group's maximum, or the sum of its two highest scores.
    Raises ValueError for numbers that do not fit each other.
    """

    num_experts: int
    experts_per_token: int
    score: Literal["softmax", "sigmoid"]
    renormalise: bool
    scale: float = 1.0
    selection_bias: bool = False
    router_bias: bool = False
    logit_scale: float = 1.0
    expert_scale: bool = False
    num_groups: int | None = None
    num_groups_kept: int | None = None
    group_score: Literal["max", "top2_sum"] = "max"

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token must be in 1..{self.num_experts} (num_experts), got {self.experts_per_token}"
            )
        if self.score not in ("softmax", "sigmoid"):
            raise ValueError(f"score must be 'softmax' or 'sigmoid', got {self.score!r}")
        if self.group_score not in ("max", "top2_sum"):
            raise ValueError(f"group_score must be 'max' or 'top2_sum', got {self.group_score!r}")
        if (self.num_groups is None) != (self.num_groups_kept is None):
            raise ValueError(
                "num_groups and num_groups_kept must be given together, or both be None: got "
                f"{self.num_groups} and {self.num_groups_kept}"
            )
        if self.num_groups is not None and self.num_groups_kept is not None:
            self._check_groups(self.num_groups, self.num_groups_kept)

    def _check_groups(self, num_groups: int, num_kept: int) -> None:
        if num_groups < 1 or self.num_experts % num_groups:
            raise ValueError(f"num_experts must divide by num_groups, got {self.num_experts} and {num_groups}")
        if not 1 <= num_kept <= num_groups:
            raise ValueError(f"num_groups_kept must be in 1..{num_groups} (num_groups), got {num_kept}")
        size = self.num_experts // num_groups
        if num_kept * size < self.experts_per_token:
            raise ValueError(
                f"the groups kept must hold at least experts_per_token = {self.experts_per_token} experts, got "
                f"{num_kept} groups of {size}: keep more groups"
            )
        if self.group_score == "top2_sum" and size < 2:
            raise ValueError(f"group_score 'top2_sum' needs groups of at least 2 experts, got {num_groups} of {size}")

    def weights(self, hidden_size: int) -> dict[str, Weight]:
        weights = {"weight": Weight(("E", "D"), (self.num_experts, hidden_size), replicated=True)}
        if self.router_bias:
            weights["bias"] = Weight(("E",), (self.num_experts,), "zeros", replicated=True)
        if self.expert_scale:
            weights["expert_scale"] = Weight(("E",), (self.num_experts,), "ones", replicated=True)
        if self.selection_bias:
            # Scores of experts lie close together: rounded, the bias would choose others.
            weights["selection_bias"] = Weight(("E",), (self.num_experts,), "zeros", replicated=True, dtype="float32")
        return weights

    def route(self, tokens: Float[Array, "B T D"], weights: dict[str, Any]) -> Routes:
        logits = router_logits(tokens, weights) * self.logit_scale
        scores = jax.nn.softmax(logits, axis=-1) if self.score == "softmax" else jax.nn.sigmoid(logits)
        eligible = scores
        if self.selection_bias:
            eligible = scores + weights["selection_bias"].astype(jnp.float32)[None, None, :]
        if self.num_groups is not None and self.num_groups_kept is not None:
            eligible = self._in_best_groups(eligible, self.num_groups, self.num_groups_kept)
        _, expert = jax.lax.top_k(eligible, self.experts_per_token)
        gate = jnp.take_along_axis(scores, expert, axis=-1)
        if self.renormalise:
            gate = gate / (jnp.sum(gate, axis=-1, keepdims=True) + _LEAST_SUM)
        if self.expert_scale:
            gate = gate * weights["expert_scale"].astype(jnp.float32)[expert]
        return Routes.of(expert, gate * self.scale)

    def _in_best_groups(
        self, scores: Float32[Array, "B T E"], num_groups: int, num_kept: int
    ) -> Float32[Array, "B T E"]:
        """The scores, minus infinity outside the groups kept."""
        grouped = scores.reshape(*scores.shape[:2], num_groups, -1)
        if self.group_score == "max":
            of_group = jnp.max(grouped, axis=-1)
        else:
            of_group = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
        _, kept = jax.lax.top_k(of_group, num_kept)
        is_kept = jnp.any(kept[..., None] == jnp.arange(num_groups)[None, None, None, :], axis=-2)
        return jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(scores.shape)
