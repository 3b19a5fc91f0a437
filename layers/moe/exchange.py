"""Sends tokens to experts and results back: the shared steps of all dispatch algorithms.

Assignments are pairs (token, slot), Y per token, -1 where there is none. `run_slots` sorts those of one device by slot,
so that each expert's tokens are contiguous; `exchange_in_rounds` sorts them by device and sends buffers of fixed size
for any routes; `combine` adds up the results.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from decodax.kernels_pallas.grouped_matmul import grouped_gate_up, grouped_matmul
from decodax.kernels_pallas.selection import Implementation
from decodax.layers.feed_forward import Activation, gated

Exchange = Callable[[Array], Array]  # [devices, ...]: sends entry i to device i, and receives entry i from it


@dataclass(frozen=True)
class Slots:
    """The experts of one device.

    weights: [slots, ...].
    activation: of the experts.
    implementation: of the kernels.
    feature_axes: the mesh axes over which F is split, if any; an all-reduce sums their results.
    """

    weights: dict[str, Any]
    activation: Activation
    implementation: Implementation | None = None
    feature_axes: str | tuple[str, ...] | None = None

    @property
    def num_slots(self) -> int:
        return self.weights["gate"].shape[0]


def run_slots(tokens: Float[Array, "M D"], slot: Int[Array, "M Y"], slots: Slots) -> Float[Array, "M Y D"]:
    """The outputs of each token's experts, zeros where slot is not in 0 .. num_slots - 1.

    Only assignments that exist are computed: the others are after the last group.
    """
    num_slots, per_token, weights = slots.num_slots, slot.shape[1], slots.weights
    of_assignment = jnp.where((slot >= 0) & (slot < num_slots), slot, num_slots).reshape(-1)
    order = jnp.argsort(of_assignment)
    sizes = jnp.sum(of_assignment[:, None] == jnp.arange(num_slots)[None, :], axis=0, dtype=jnp.int32)
    inputs, of_input = tokens[order // per_token], jnp.minimum(of_assignment[order], num_slots - 1)
    options: Any = {"implementation": slots.implementation}
    if slots.activation == "silu" and "gate_bias" not in weights:
        hidden = grouped_gate_up(inputs, weights["gate"], weights["up"], sizes, **options)
    else:
        gate, up = (_with_bias(grouped_matmul(inputs, weights[name], sizes, **options), weights, name, of_input)
                    for name in ("gate", "up"))  # fmt: skip
        hidden = gated(slots.activation, gate, up)
    result = grouped_matmul(hidden, weights["down"], sizes, **options)
    if slots.feature_axes is not None:
        result = jax.lax.psum(result, slots.feature_axes)
    result = _with_bias(result, weights, "down", of_input)
    result = result[jnp.argsort(order)].reshape(*slot.shape, -1)
    return jnp.where((of_assignment < num_slots).reshape(*slot.shape, 1), result, jnp.zeros((), result.dtype))


def _with_bias(product: Array, weights: dict[str, Any], name: str, of_input: Array) -> Array:
    bias = weights.get(f"{name}_bias")
    return product if bias is None else product + bias[of_input].astype(product.dtype)


def combine(results: Float[Array, "M Y D"], gate: Float32[Array, "M Y"], exists: Array) -> Float32[Array, "M D"]:
    """The sum of a token's results, each times its gate, over the assignments that exist."""
    weighted = jnp.where(exists[..., None], gate[..., None] * results.astype(jnp.float32), 0.0)
    return jnp.sum(weighted, axis=1)


def exchange_in_rounds(
    tokens: Float[Array, "M D"],
    slot: Int[Array, "M Y"],
    *,
    slots: Slots,
    num_devices: int,
    capacity: int,
    exchange: Exchange,
    over: str | tuple[str, ...],
) -> tuple[Float[Array, "M Y D"], Int[Array, ""]]:
    """`run_slots` for tokens of this device and slots of all: slot s is on device s // (slots of one device).

    Also returns how many assignments of all devices did not fit into the first round.

    tokens: of this device.
    slot: of each assignment.
    slots: of this device.
    num_devices: of the exchange.
    capacity: how many assignments one device sends another in a round. There are as many rounds as the fullest pair of
        devices needs, so that no token is dropped.
    exchange: of buffers [devices, capacity, ...], its own inverse.
    over: the mesh axes of the devices.
    """
    num_tokens, per_token = slot.shape
    assigned = slot.reshape(-1)
    device = jnp.where(assigned >= 0, assigned // slots.num_slots, num_devices)
    order = jnp.argsort(device)
    count = jnp.sum(device[:, None] == jnp.arange(num_devices)[None, :], axis=0, dtype=jnp.int32)
    start = jnp.cumsum(count) - count
    destination = jnp.minimum(device, num_devices - 1)
    rank = jnp.argsort(order).astype(jnp.int32) - start[destination]  # of an assignment among those for its device

    def send_and_receive(round_and_results: tuple[Array, Array]) -> tuple[Array, Array]:
        index, results = round_and_results
        cell = index * capacity + jnp.arange(capacity, dtype=jnp.int32)[None, :]
        is_filled = cell < count[:, None]
        source = order[jnp.where(is_filled, start[:, None] + cell, 0)]
        sent_slot = jnp.where(is_filled, assigned[source] % slots.num_slots, -1)
        received = exchange(tokens[source // per_token]).reshape(num_devices * capacity, -1)
        result = run_slots(received, exchange(sent_slot).reshape(-1, 1), slots)
        returned = exchange(result.reshape(num_devices, capacity, -1))
        column = rank - index * capacity
        is_here = (device < num_devices) & (column >= 0) & (column < capacity)
        own = returned[destination, jnp.clip(column, 0, capacity - 1)]
        return index + 1, jnp.where(is_here[:, None], own, results)

    num_rounds = jax.lax.pmax(-(-jnp.max(count) // capacity), over)
    num_overflowed = jax.lax.psum(jnp.sum(jnp.maximum(count - capacity, 0)), over)
    nothing = jnp.zeros((num_tokens * per_token, tokens.shape[1]), tokens.dtype)
    state = (jnp.zeros((), jnp.int32), nothing)
    _, results = jax.lax.while_loop(lambda state: state[0] < num_rounds, send_and_receive, state)
    return results.reshape(num_tokens, per_token, -1), num_overflowed


def default_capacity(num_assignments: int, num_devices: int) -> int:
    """Twice the mean number of assignments per device, at least 8 (one tile), at most all."""
    return min(num_assignments, max(8, -(-2 * num_assignments // num_devices)))
