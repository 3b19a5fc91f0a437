"""Runs a function on the devices that hold the experts, each with its own shard of the weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from decodax.layers.execution import Execution
from decodax.layers.moe.dispatch.contract import Setting
from decodax.layers.moe.exchange import Exchange, Slots, combine, default_capacity, exchange_in_rounds
from decodax.layers.moe.placement import Placement
from decodax.layers.moe.routes import Routes
from decodax.sharding.regions import on_each_device
from decodax.sharding.rules import num_devices

AXES = {
    "gate": ("E", "F", "D"),
    "up": ("E", "F", "D"),
    "down": ("E", "D", "F"),
    "gate_bias": ("E", "F"),
    "up_bias": ("E", "F"),
    "down_bias": ("E", "D"),
}
MeshAxes = str | tuple[str, ...]


def mesh_axes(execution: Execution, axis_name: str) -> MeshAxes | None:
    """The mesh axes over which a dimension of the weights is split, None for none."""
    names = execution.mesh_axes(axis_name)
    return names if len(names) > 1 else names[0] if names else None


def expert_axes(execution: Execution, dispatch: str) -> MeshAxes:
    """The mesh axes over which experts are split.

    Raises ValueError, naming the dispatch algorithm, if they are not.
    """
    axes = mesh_axes(execution, "E")
    if axes is None:
        raise ValueError(
            f"experts={dispatch!r} needs experts that are split over devices, got rules {execution.rules.pairs} and a "
            f"mesh with axes {None if execution.mesh is None else execution.mesh.axis_names}: give Execution a mesh, "
            "and rules with a pair ('E', one of its axes). On one device use 'sorted'"
        )
    return axes


def placement_for(setting: Setting, num_slots: int, num_devices: int) -> Placement:
    """The placement of a setting; without one, experts in their order, the same number on each device.

    num_slots: of the weights.
    Raises ValueError if they are not those of the placement, or do not divide.
    """
    placement = setting.placement
    if placement is None:
        placement = Placement.contiguous(num_slots, num_devices)
        if placement.num_slots != num_slots:
            raise ValueError(
                f"{num_slots} experts do not divide over {num_devices} devices: use a placement with empty slots "
                f"(Placement.contiguous({num_slots}, {num_devices}), and its `arrange` for the weights)"
            )
    if placement.num_slots != num_slots:
        raise ValueError(
            f"the placement has {placement.num_slots} slots and the weights are for {num_slots}: reorder them "
            f"with Placement.arrange"
        )
    if num_devices > 1 and placement.num_devices != num_devices:
        raise ValueError(f"the placement is for {placement.num_devices} devices, experts are split over {num_devices}")
    return placement


def on_devices(
    function: Callable[..., Any],
    execution: Execution,
    weights: dict[str, Any],
    *,
    tokens: MeshAxes | None,
    weight_axes: dict[str, tuple[str, ...]] = AXES,
) -> Callable[..., tuple[Array, Array]]:
    """`function(tokens, slot, gate, weights)` run by every device; it returns (tokens, a number to be summed).

    function: of a device's tokens, slots, gates and weights. Each device gets the same number of tokens, some of them
        perhaps padding (slot -1). Rows of other expert groups stay on their devices.
    execution: with the mesh.
    weights: of the experts.
    tokens: the mesh axes of the experts over which tokens are split; None where all devices of an expert group have the
        same tokens.
    weight_axes: the logical axes of each weight.
    """
    if execution.mesh is None:
        return function
    mesh, groups = execution.mesh, row_axes(execution)
    split = (*groups, *((tokens,) if isinstance(tokens, str) else tokens or ()))
    weight_specs = {name: execution.rules.spec(mesh, weight_axes[name]) for name in weights}
    per_token = PartitionSpec(split)

    def local(tokens: Array, slot: Array, gate: Array, weights: dict[str, Any]) -> tuple[Array, Array]:
        output, number = function(tokens, slot, gate, weights)
        return output, jax.lax.psum(number, groups)

    in_specs, out_specs = (per_token, per_token, per_token, weight_specs), (per_token, PartitionSpec())
    run = on_each_device(local, mesh, in_specs, out_specs)

    def padded(tokens: Array, slot: Array, gate: Array, weights: dict[str, Any]) -> tuple[Array, Array]:
        num_tokens = tokens.shape[0]
        missing = ((0, -num_tokens % num_devices(mesh, split)), (0, 0))
        slot = jnp.pad(slot, missing, constant_values=-1)
        output, number = run(jnp.pad(tokens, missing), slot, jnp.pad(gate, missing), weights)
        return output[:num_tokens], number

    return padded


def row_axes(execution: Execution) -> tuple[str, ...]:
    """The mesh axes that split rows and not experts: each of their devices is another expert group."""
    experts = execution.mesh_axes("E")
    return tuple(name for name in execution.mesh_axes("B") if name not in experts)


def run_exchanged(
    tokens: Float[Array, "M D"],
    assigned: tuple[Array, Array],
    weights: dict[str, Any],
    setting: Setting,
    *,
    exchange: Exchange,
    over: MeshAxes,
    capacity: int | None,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = lambda weights: weights,
) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
    """Each device sends its share of the tokens to their experts by `exchange`, and sums the returned results.

    tokens: of all devices.
    assigned: slots [M, Y] and gates.
    weights: of the experts.
    setting: of the layer.
    exchange: of buffers between devices.
    over: the mesh axes of the experts.
    capacity: assignments from one device to another in one round; None for twice the mean.
    prepare: maps a device's weights before they run.
    """
    execution, (slot, gate) = setting.execution, assigned
    assert execution.mesh is not None  # or experts would not be split
    num_shards = execution.num_shards("E")
    if capacity is None:
        per_device = -(-tokens.shape[0] // (num_shards * num_devices(execution.mesh, row_axes(execution))))
        capacity = default_capacity(per_device * slot.shape[1], num_shards)

    def local(tokens: Array, slot: Array, gate: Array, weights: dict[str, Any]) -> tuple[Array, Array]:
        slots = local_slots(prepare(weights), setting)
        results, num_overflowed = exchange_in_rounds(
            tokens, slot, slots=slots, num_devices=num_shards, capacity=capacity, exchange=exchange, over=over
        )
        return combine(results, gate, slot >= 0).astype(tokens.dtype), num_overflowed

    return on_devices(local, execution, weights, tokens=over)(tokens, slot, gate, weights)


def local_slots(weights: dict[str, Any], setting: Setting) -> Slots:
    """A device's own experts; where F is split over another mesh axis, an all-reduce over it sums their results."""
    execution = setting.execution
    return Slots(weights, setting.activation, execution.implementation, mesh_axes(execution, "F"))


def check_routes(routes: Routes, tokens: Array) -> None:
    """Raises ValueError unless the routes are those of these tokens."""
    if routes.expert.ndim != 2 or routes.expert.shape[0] != tokens.shape[0]:
        raise ValueError(f"routes must be [M, X] for {tokens.shape[0]} tokens (M), got {routes.expert.shape}")


def check_capacity(capacity: int | None) -> None:
    """Raises ValueError for a capacity below 1."""
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity must be at least 1 (choices from one device to another), or None, got {capacity}")
