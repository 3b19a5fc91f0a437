"""Tokens sorted by expert, then products of groups: the work of the experts chosen, and no other, on one device.

MegaBlocks: Efficient Sparse Training with Mixture-of-Experts, arXiv 2211.15841 (`kernels_pallas/grouped_matmul/`).
Where the weights' F is split over devices, each computes with its part of every expert, and the results are added up.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.layers.moe.dispatch import combine, run_slots
from decodax.layers.moe.experts._contract import Setting
from decodax.layers.moe.experts._devices import check_routes, local_slots, mesh_axes, on_devices, placement_for
from decodax.layers.moe.routes import Routes


@dataclass(frozen=True)
class Sorted:
    """Sort by expert, gate and up, down, back into order, weighted sum. Raises ValueError if experts are split."""

    def run(
        self, tokens: Float[Array, "M D"], routes: Routes, weights: dict[str, Any], setting: Setting
    ) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
        check_routes(routes, tokens)
        split_over = mesh_axes(setting.execution, "E")
        if split_over is not None:
            raise ValueError(
                f"experts='sorted' runs on devices that each have all experts, these are split over mesh axis "
                f"{split_over!r}: use 'all_to_all' or 'gather_scatter', or rules without 'E'"
            )
        placement = placement_for(setting, weights["gate"].shape[0], 1)

        def local(tokens: Array, slot: Array, gate: Array, weights: dict[str, Any]) -> tuple[Array, Array]:
            results = run_slots(tokens, slot, local_slots(weights, setting))
            return combine(results, gate, slot >= 0).astype(tokens.dtype), jnp.zeros((), jnp.int32)

        run = on_devices(local, setting.execution, weights, tokens=None)
        return run(tokens, *placement.assign(routes.expert, routes.gate), weights)
