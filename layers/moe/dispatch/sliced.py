"""Implements expert slicing for fewer experts than devices: each expert is cut over several devices.

Tutel: Adaptive Mixture-of-Experts at Scale, arXiv 2206.03382. With s = devices / experts, device e * s + i holds slice
i of expert e, for every degree r:

    r = s        each device computes with its own slice; a token goes to all s devices of its expert
    0 < r < s    devices all-gather s / r slices, which gives r slices of an expert, and s / r sets of them; a token
                 goes to the r devices of one set, and tokens alternate between the sets
    r = 0        every device all-gathers all experts and keeps its tokens

so that the best degree may change with the number of tokens without moving weights. A token's own device sums the
slices' results. With s = 1, r = 1 is `all_to_all`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from decodax.layers.moe.dispatch._devices import (
    MeshAxes,
    check_capacity,
    check_routes,
    expert_axes,
    local_slots,
    on_devices,
    placement_for,
    run_exchanged,
)
from decodax.layers.moe.dispatch.contract import Setting
from decodax.layers.moe.exchange import combine, run_slots
from decodax.layers.moe.placement import Placement, join
from decodax.layers.moe.routes import Routes


@dataclass(frozen=True)
class Sliced:
    """The options of expert slicing.

    degree: r, 0 or a divisor of the placement's slices; None for Tutel's rule: r = s if the numbers that a device
        receives for its expert's tokens, times (s - 1) * 2, are fewer than those of its weights, else r = 1.
    capacity: as in `AllToAll`.
    """

    degree: int | None = None
    capacity: int | None = None

    def __post_init__(self) -> None:
        check_capacity(self.capacity)

    def run(
        self, tokens: Float[Array, "M D"], routes: Routes, weights: dict[str, Any], setting: Setting
    ) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
        check_routes(routes, tokens)
        over = expert_axes(setting.execution, "sliced")
        placement = placement_for(setting, weights["gate"].shape[0], setting.execution.num_shards("E"))
        slices, degree = placement.slices, self._degree(tokens, routes, weights, placement)
        _check_layout(placement, over)
        if degree == 0:
            return _gathered(tokens, routes, weights, setting, slices=slices, over=over)
        together = slices // degree
        exchange = partial(jax.lax.all_to_all, axis_name=over, split_axis=0, concat_axis=0, tiled=True)
        prepare = partial(_gather_slices, together=together, num_devices=placement.num_devices, over=over)
        assigned = _assign(routes.expert, routes.gate, slices, degree)
        return run_exchanged(
            tokens,
            assigned,
            weights,
            setting,
            exchange=exchange,
            over=over,
            capacity=self.capacity,
            prepare=prepare if together > 1 else lambda weights: weights,
        )

    def _degree(self, tokens: Array, routes: Routes, weights: dict[str, Any], placement: Placement) -> int:
        slices = placement.slices
        if self.degree is None:
            received = routes.expert.size * tokens.shape[1] // placement.num_devices
            held = sum(weight.size for weight in weights.values()) // placement.num_devices
            return slices if received * (slices - 1) * 2 < held else 1
        if self.degree != 0 and (self.degree < 0 or slices % self.degree):
            raise ValueError(f"degree must be 0 or a divisor of the placement's {slices} slices, got {self.degree}")
        return self.degree


def _check_layout(placement: Placement, over: MeshAxes) -> None:
    expected = Placement.contiguous(placement.num_experts, placement.num_devices, placement.slices)
    if placement != expected or (placement.slices > 1 and placement.slots_per_device != 1):
        raise ValueError(
            f"experts='sliced' needs the placement Placement.contiguous(num_experts, num_devices, slices) with "
            f"num_experts x slices = num_devices ({placement.num_devices}), or with slices=1; got {placement}: use "
            f"'all_to_all' for others"
        )
    if placement.slices > 1 and not isinstance(over, str):
        raise ValueError(f"experts='sliced' needs experts that are split over one mesh axis, got {over}")


def _assign(
    expert: Int[Array, "M X"], gate: Float32[Array, "M X"], slices: int, degree: int
) -> tuple[Int[Array, "M Y"], Float32[Array, "M Y"]]:
    """The devices e * s + c * (s / r) + m mod (s / r) for c = 0 .. r - 1, of each token m and expert e.

    expert, gate: of the routes.
    slices: s.
    degree: r.
    """
    together, num_tokens = slices // degree, expert.shape[0]
    piece = jnp.arange(degree, dtype=jnp.int32) * together
    turn = jnp.arange(num_tokens, dtype=jnp.int32) % together
    slot = expert[:, :, None] * slices + piece[None, None, :] + turn[:, None, None]
    slot = jnp.where(expert[:, :, None] >= 0, slot, -1)
    return slot.reshape(num_tokens, -1), jnp.repeat(gate, degree, axis=1)


def _gather_slices(weights: dict[str, Any], *, together: int, num_devices: int, over: MeshAxes) -> dict[str, Any]:
    """A device's slice joined with those of its `together` - 1 neighbours.

    weights: of the device.
    together: slices to join.
    num_devices: of the experts.
    over: the mesh axes of the experts.
    """
    groups = [list(range(first, first + together)) for first in range(0, num_devices, together)]
    gather = partial(jax.lax.all_gather, axis_name=over, axis_index_groups=groups, tiled=True)
    return {name: join(name, gather(weight), together) for name, weight in weights.items()}


def _gathered(
    tokens: Array, routes: Routes, weights: dict[str, Any], setting: Setting, *, slices: int, over: MeshAxes
) -> tuple[Array, Array]:
    """r = 0: all experts on every device, for its share of the tokens.

    tokens, routes, weights, setting: as in `run`.
    slices: of an expert.
    over: the mesh axes of the experts.
    """

    def local(tokens: Array, expert: Array, gate: Array, weights: dict[str, Any]) -> tuple[Array, Array]:
        gather = partial(jax.lax.all_gather, axis_name=over, tiled=True)
        joined = {name: join(name, gather(weight), slices) for name, weight in weights.items()}
        results = run_slots(tokens, expert, local_slots(joined, setting))
        return combine(results, gate, expert >= 0).astype(tokens.dtype), jnp.zeros((), jnp.int32)

    return on_devices(local, setting.execution, weights, tokens=over)(tokens, routes.expert, routes.gate, weights)
