"""Sorts tokens by expert and runs grouped matrix products: only the chosen experts' work, on one device.

MegaBlocks: Efficient Sparse Training with Mixture-of-Experts, arXiv 2211.15841 (`kernels_pallas/grouped_matmul/`).
Where the weights' F is split over devices, each computes with its shard of every expert, and an all-reduce follows.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.layers.moe.dispatch._devices import check_routes, local_slots, mesh_axes, on_devices, placement_for
from decodax.layers.moe.dispatch.contract import Setting
from decodax.layers.moe.exchange import combine, run_slots
from decodax.layers.moe.routes import Routes


@dataclass(frozen=True)
class Sorted:
    """Sort by expert, gate and up, down, unsort, weighted sum. Raises ValueError if experts are split."""

    def run(
        self, tokens: Float[Array, "M D"], routes: Routes, weights: dict[str, Any], setting: Setting
    ) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
        check_routes(routes, tokens)
        split_over = mesh_axes(setting.execution, "E")
        if split_over is not None:
            raise ValueError(
                f"experts='sorted' needs all experts on every device, got experts split over mesh axis "
                f"{split_over!r}: use 'all_to_all' or 'gather_scatter', or rules without 'E'"
            )
        placement = placement_for(setting, weights["gate"].shape[0], 1)

        def local(tokens: Array, slot: Array, gate: Array, weights: dict[str, Any]) -> tuple[Array, Array]:
            results = run_slots(tokens, slot, local_slots(weights, setting))
            return combine(results, gate, slot >= 0).astype(tokens.dtype), jnp.zeros((), jnp.int32)

        run = on_devices(local, setting.execution, weights, tokens=None)
        return run(tokens, *placement.assign(routes.expert, routes.gate), weights)
