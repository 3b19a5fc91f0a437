"""Implements expert parallelism for few tokens: every device runs its own experts on all tokens, then an all-reduce.

DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI Scale, arXiv 2201.05596.
There, devices that hold the same tokens drop those of other devices before an all-to-all; here all devices hold the
same tokens, and need no all-to-all: one all-reduce of [tokens, width], instead of two padded all-to-alls. While tokens
are few, a step's time is that of reading weights, and a collective's that of starting it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.layers.moe.dispatch._devices import check_routes, expert_axes, local_slots, on_devices, placement_for
from decodax.layers.moe.dispatch.contract import Setting
from decodax.layers.moe.exchange import combine, run_slots
from decodax.layers.moe.routes import Routes


@dataclass(frozen=True)
class GatherScatter:
    """All-reduce of every device's weighted sum over the choices whose experts it holds."""

    def run(
        self, tokens: Float[Array, "M D"], routes: Routes, weights: dict[str, Any], setting: Setting
    ) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
        check_routes(routes, tokens)
        over = expert_axes(setting.execution, "gather_scatter")
        placement = placement_for(setting, weights["gate"].shape[0], setting.execution.num_shards("E"))

        def local(tokens: Array, slot: Array, gate: Array, weights: dict[str, Any]) -> tuple[Array, Array]:
            slots = local_slots(weights, setting)
            is_own = (slot >= 0) & (slot // slots.num_slots == jax.lax.axis_index(over))
            results = run_slots(tokens, jnp.where(is_own, slot % slots.num_slots, -1), slots)
            total = jax.lax.psum(combine(results, gate, is_own), over)
            return total.astype(tokens.dtype), jnp.zeros((), jnp.int32)

        run = on_devices(local, setting.execution, weights, tokens=None)
        return run(tokens, *placement.assign(routes.expert, routes.gate), weights)
