"""Implements expert parallelism over nodes of several devices: an all-to-all within each node, then between nodes.

DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI Scale, arXiv 2201.05596.
Between nodes a device sends only to the devices with its own index there, one large message to each node instead of
many small ones: with p devices in nodes of G, each sends p/G + G messages, not p.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from decodax.layers.moe.dispatch._devices import (
    check_capacity,
    check_routes,
    expert_axes,
    placement_for,
    run_exchanged,
)
from decodax.layers.moe.dispatch.contract import Setting
from decodax.layers.moe.routes import Routes


@dataclass(frozen=True)
class Hierarchical:
    """Experts must be split over two mesh axes, (nodes, devices of a node).

    capacity: as in `AllToAll`.
    """

    capacity: int | None = None

    def __post_init__(self) -> None:
        check_capacity(self.capacity)

    def run(
        self, tokens: Float[Array, "M D"], routes: Routes, weights: dict[str, Any], setting: Setting
    ) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
        check_routes(routes, tokens)
        over = expert_axes(setting.execution, "hierarchical")
        if isinstance(over, str) or len(over) != 2:
            raise ValueError(
                f"experts='hierarchical' needs experts that are split over two mesh axes, (nodes, devices of a node), "
                f"got {over!r}: use rules with ('E', (one axis, another)), or 'all_to_all'"
            )
        placement = placement_for(setting, weights["gate"].shape[0], setting.execution.num_shards("E"))
        mesh = setting.execution.mesh
        assert mesh is not None
        exchange = partial(_in_two_steps, nodes=over[0], devices=over[1], shape=(mesh.shape[over[0]], -1))
        assigned = placement.assign(routes.expert, routes.gate)
        return run_exchanged(tokens, assigned, weights, setting, exchange=exchange, over=over, capacity=self.capacity)


def _in_two_steps(buffer: Array, *, nodes: str, devices: str, shape: tuple[int, int]) -> Array:
    """[node * device, ...]: sends entry i to device i, and receives entry i from it.

    buffer: of this device.
    nodes, devices: the two mesh axes.
    shape: (nodes, devices of a node).
    """
    by_node = buffer.reshape(*shape, *buffer.shape[1:])
    in_node = jax.lax.all_to_all(by_node, devices, split_axis=1, concat_axis=1, tiled=True)
    return jax.lax.all_to_all(in_node, nodes, split_axis=0, concat_axis=0, tiled=True).reshape(buffer.shape)
