"""Runs every expert on every token, with gates of 0 for those not chosen: E / X times the work, the simplest code.

The reference for the other algorithms. A token's result does not depend on the experts of other tokens, not even in the
last bit, so the invariant mode uses this one. Works under any partitioning by the compiler.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.core.linear import linear
from decodax.layers.feed_forward import gated
from decodax.layers.moe.dispatch._devices import check_routes
from decodax.layers.moe.dispatch.contract import Setting
from decodax.layers.moe.routes import Routes


@dataclass(frozen=True)
class Dense:
    """sum over e of gate[e] * expert_e(token), where gate[e] is 0 for experts that the token did not choose."""

    def run(
        self, tokens: Float[Array, "M D"], routes: Routes, weights: dict[str, Any], setting: Setting
    ) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
        check_routes(routes, tokens)
        if setting.placement is not None:
            weights = setting.placement.restore(weights)

        def add_expert(total: Array, this: tuple[Array, dict[str, Any]]) -> tuple[Array, None]:
            index, expert = this
            gate = linear(tokens, expert["gate"], expert.get("gate_bias"))
            up = linear(tokens, expert["up"], expert.get("up_bias"))
            hidden = gated(setting.activation, gate, up)
            result = linear(hidden, expert["down"], expert.get("down_bias")).astype(jnp.float32)
            is_choice = routes.expert == index
            gate = jnp.sum(jnp.where(is_choice, routes.gate, 0.0), axis=1, keepdims=True)
            chosen = jnp.any(is_choice, axis=1, keepdims=True)
            return total + jnp.where(chosen, gate * result, 0.0), None

        num_experts = weights["gate"].shape[0]
        total = jnp.zeros(tokens.shape, jnp.float32)
        total, _ = jax.lax.scan(add_expert, total, (jnp.arange(num_experts, dtype=jnp.int32), weights))
        return total.astype(tokens.dtype), jnp.zeros((), jnp.int32)
