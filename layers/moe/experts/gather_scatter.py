"""Expert parallelism for few tokens: every device sees all of them, runs those for its own experts, and all add up.

DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI Scale, arXiv 2201.05596.
Its devices that hold the same tokens drop those that are not theirs before an exchange; here all devices hold the same,
and nothing is left to exchange: one sum of [tokens, width] over devices, where an exchange takes two and pads them.
While a step's tokens are few, its time is that of reading weights, and a collective's that of starting it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.layers.moe.dispatch import combine, run_slots
from decodax.layers.moe.experts._contract import Setting
from decodax.layers.moe.experts._devices import check_routes, expert_axes, local_slots, on_devices, placement_for
from decodax.layers.moe.routes import Routes


@dataclass(frozen=True)
class GatherScatter:
    """psum over devices of the weighted sum of those choices whose experts the device holds."""

    def run(
        self, tokens: Float[Array, "M D"], routes: Routes, weights: dict[str, Any], setting: Setting
    ) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
        check_routes(routes, tokens)
        over = expert_axes(setting.execution, "gather_scatter")
        placement = placement_for(setting, weights["gate"].shape[0], setting.execution.num_parts("E"))

        def local(tokens: Array, slot: Array, gate: Array, weights: dict[str, Any]) -> tuple[Array, Array]:
            slots = local_slots(weights, setting)
            is_own = (slot >= 0) & (slot // slots.num_slots == jax.lax.axis_index(over))
            results = run_slots(tokens, jnp.where(is_own, slot % slots.num_slots, -1), slots)
            total = jax.lax.psum(combine(results, gate, is_own), over)
            return total.astype(tokens.dtype), jnp.zeros((), jnp.int32)

        run = on_devices(local, setting.execution, weights, tokens=None)
        return run(tokens, *placement.assign(routes.expert, routes.gate), weights)
