"""Describes the placement of experts: a table from each expert to slots on devices, with replicas or slices.

It is data, so that any plan can place experts: busy ones twice, those that are used together side by side. `arrange`
reorders weights from the order of the experts to the order of the slots.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int


@dataclass(frozen=True)
class Placement:
    """The slots of every expert; a slot may be empty.

    num_experts: E.
    num_devices: over which experts are split.
    slots_per_device: on each device.
    replicas: replicas[e * slices + i] lists the (device, slot) pairs that hold slice i of expert e.
    slices: equal slices of an expert, along F.
    Raises ValueError for an expert without a slot, a slot that does not exist, and one that is used twice.
    """

    num_experts: int
    num_devices: int
    slots_per_device: int
    replicas: tuple[tuple[tuple[int, int], ...], ...] = field(repr=False)
    slices: int = 1

    def __post_init__(self) -> None:
        if len(self.replicas) != self.num_experts * self.slices:
            raise ValueError(
                f"replicas must have one entry per expert and slice ({self.num_experts} x {self.slices}), got "
                f"{len(self.replicas)}"
            )
        owner: dict[tuple[int, int], str] = {}
        for index, places in enumerate(self.replicas):
            name = self._name(index)
            if not places:
                raise ValueError(f"{name} must have at least one (device, slot), got none")
            for device, slot in places:
                if not (0 <= device < self.num_devices and 0 <= slot < self.slots_per_device):
                    raise ValueError(
                        f"{name}: (device, slot) must be within {self.num_devices} devices of {self.slots_per_device} "
                        f"slots, got {(device, slot)}"
                    )
                if (device, slot) in owner:
                    raise ValueError(
                        f"device {device}, slot {slot} must hold one expert, got {owner[device, slot]} and {name}"
                    )
                owner[device, slot] = name

    def _name(self, index: int) -> str:
        expert, slice_index = divmod(index, self.slices)
        return f"expert {expert}" if self.slices == 1 else f"slice {slice_index} of expert {expert}"

    @classmethod
    def contiguous(cls, num_experts: int, num_devices: int, slices: int = 1) -> "Placement":
        """The experts in their order, with the same number of slots on each device; weights keep their order.

        If experts do not divide, the last slots are empty. Raises ValueError if there are more devices than slices.
        """
        num_slices = num_experts * slices
        if num_devices > num_slices:
            raise ValueError(
                f"{num_devices} devices are more than {num_experts} experts x {slices} slices: cut experts into "
                f"slices={-(-num_devices // num_experts)}, or split them over at most {num_slices} devices"
            )
        per_device = -(-num_slices // num_devices)
        places = tuple(((index // per_device, index % per_device),) for index in range(num_slices))
        return cls(num_experts, num_devices, per_device, places, slices)

    @property
    def num_slots(self) -> int:
        """Slots of all devices: entries of a layer's weights, with replicas and empty slots."""
        return self.num_devices * self.slots_per_device

    @cached_property
    def _slots(self) -> np.ndarray:
        """The slots of each slice, [slices, most replicas], numbered over all devices; padded with the first slot."""
        most = max(map(len, self.replicas))
        slots = [[device * self.slots_per_device + slot for device, slot in places] for places in self.replicas]
        return np.array([places + places[:1] * (most - len(places)) for places in slots], np.int32)

    def arrange(self, weights: dict[str, Any]) -> dict[str, Any]:
        """Weights of the experts [E, ...] to weights of the slots [P, ...], P = num_slots; empty slots hold zeros.

        With slices, gate and up (and their biases) are cut along F, and down along its inputs; the bias of down stays
        with the first slice, as the slices' results are added up.
        """
        slice_of_slot = np.full(self.num_slots, -1)
        for index, places in enumerate(self.replicas):
            for device, slot in places:
                slice_of_slot[device * self.slots_per_device + slot] = index

        def of_slots(name: str, weight: Any) -> Array:
            cut = _cut(name, jnp.asarray(weight), self.slices)
            held = jnp.asarray(slice_of_slot >= 0).reshape(-1, *(1,) * (cut.ndim - 1))
            return jnp.where(held, cut[np.maximum(slice_of_slot, 0)], jnp.zeros((), cut.dtype))

        return {name: of_slots(name, weight) for name, weight in weights.items()}

    def restore(self, weights: dict[str, Any]) -> dict[str, Any]:
        """The inverse: weights of the experts, joined and in their order, from weights of the slots."""
        first = self._slots[:, 0]
        return {name: join(name, jnp.asarray(weight)[first], self.slices) for name, weight in weights.items()}

    def assign(
        self, expert: Int[Array, "M X"], gate: Float32[Array, "M X"]
    ) -> tuple[Int[Array, "M Y"], Float32[Array, "M Y"]]:
        """The slots of each token's experts, -1 for none, and their gates: Y = X * slices.

        Token m goes to replica m modulo the number of replicas.
        """
        slots = jnp.asarray(self._slots)
        index = expert[..., None] * self.slices + jnp.arange(self.slices, dtype=jnp.int32)[None, None, :]
        index = jnp.where(expert[..., None] >= 0, index, -1).reshape(expert.shape[0], -1)
        known = jnp.maximum(index, 0)
        count = jnp.asarray([len(places) for places in self.replicas], jnp.int32)[known]
        turn = jnp.arange(expert.shape[0], dtype=jnp.int32)[:, None] % count
        slot = jnp.where(index >= 0, slots[known, turn], -1)
        return slot, jnp.repeat(gate, self.slices, axis=1)


def _cut(name: str, weight: Array, slices: int) -> Array:
    """Cuts experts [E, ...] into slices [E * slices, ...]."""
    num_experts = weight.shape[0]
    if name == "down_bias":
        rest = jnp.zeros((num_experts, slices - 1, weight.shape[1]), weight.dtype)
        return jnp.concatenate([weight[:, None], rest], axis=1).reshape(num_experts * slices, -1)
    axis = 2 if name == "down" else 1
    if weight.shape[axis] % slices:
        raise ValueError(f"{name}: its {weight.shape[axis]} features do not divide into {slices} slices")
    shape = (*weight.shape[:axis], slices, weight.shape[axis] // slices, *weight.shape[axis + 1 :])
    cut = jnp.moveaxis(weight.reshape(shape), axis, 1)
    return cut.reshape(num_experts * slices, *cut.shape[2:])


def join(name: str, pieces: Array, slices: int) -> Array:
    """Joins consecutive slices [E * slices, ...] into experts [E, ...]."""
    by_expert = pieces.reshape(-1, slices, *pieces.shape[1:])
    if name == "down_bias":
        return by_expert[:, 0]  # the other slices are zeros
    axis = 2 if name == "down" else 1
    together = jnp.moveaxis(by_expert, 1, axis)
    return together.reshape(*together.shape[:axis], -1, *together.shape[axis + 2 :])
