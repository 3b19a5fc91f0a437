"""Implements expert parallelism with all-to-alls: sends tokens to the devices of their experts, and results back.

GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding, arXiv 2006.16668. Departs from it:
tokens that do not fit into the buffers are not dropped but sent in further rounds, and counted.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from decodax.layers.moe.dispatch._devices import check_capacity, check_routes, expert_axes, placement_for, run_exchanged
from decodax.layers.moe.dispatch.contract import Setting
from decodax.layers.moe.routes import Routes


@dataclass(frozen=True)
class AllToAll:
    """capacity: choices that one device sends another in one round; None for twice the mean."""

    capacity: int | None = None

    def __post_init__(self) -> None:
        check_capacity(self.capacity)

    def run(
        self, tokens: Float[Array, "M D"], routes: Routes, weights: dict[str, Any], setting: Setting
    ) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
        check_routes(routes, tokens)
        over = expert_axes(setting.execution, "all_to_all")
        placement = placement_for(setting, weights["gate"].shape[0], setting.execution.num_shards("E"))
        assigned = placement.assign(routes.expert, routes.gate)
        exchange = partial(jax.lax.all_to_all, axis_name=over, split_axis=0, concat_axis=0, tiled=True)
        return run_exchanged(tokens, assigned, weights, setting, exchange=exchange, over=over, capacity=self.capacity)
