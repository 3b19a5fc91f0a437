"""Where experts are: a table from each expert to slots on devices, which may hold copies of it, or slices.

Data and not code, so that experts can be placed by any plan: the busy ones twice, those that are used together side by
side. `arrange` brings weights that are in the order of the experts into the order of the slots.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int


@dataclass(frozen=True)
class Placement:
    """replicas[e]: the (device, slot) pairs that hold expert e, of `slots_per_device` slots on each of `num_devices`.

    slices: experts may be cut along F into so many equal slices, each with its own entry: replicas[e * slices + i] is
    slice i of expert e. Slots that hold nothing are allowed.

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
        for part, places in enumerate(self.replicas):
            name = self._name(part)
            if not places:
                raise ValueError(f"{name} is nowhere: give it at least one (device, slot)")
            for device, slot in places:
                if not (0 <= device < self.num_devices and 0 <= slot < self.slots_per_device):
                    raise ValueError(
                        f"{name}: (device, slot) must be within {self.num_devices} devices of {self.slots_per_device} "
                        f"slots, got {(device, slot)}"
                    )
                if (device, slot) in owner:
                    raise ValueError(f"device {device}, slot {slot} has {owner[device, slot]}, and {name} wants it too")
                owner[device, slot] = name

    def _name(self, part: int) -> str:
        expert, index = divmod(part, self.slices)
        return f"expert {expert}" if self.slices == 1 else f"slice {index} of expert {expert}"

    @classmethod
    def contiguous(cls, num_experts: int, num_devices: int, slices: int = 1) -> "Placement":
        """The experts in their order, as many on each device as there are on the first; weights stay as they are.

        If they do not divide, the last slots stay empty. Raises ValueError if some devices would have nothing.
        """
        num_parts = num_experts * slices
        if num_devices > num_parts:
            raise ValueError(
                f"{num_devices} devices are more than {num_experts} experts x {slices} slices: cut experts into "
                f"slices={-(-num_devices // num_experts)}, or split them over at most {num_parts} devices"
            )
        per_device = -(-num_parts // num_devices)
        places = tuple(((part // per_device, part % per_device),) for part in range(num_parts))
        return cls(num_experts, num_devices, per_device, places, slices)

    @property
    def num_slots(self) -> int:
        """Of all devices: how many experts (or slices) the weights of a layer hold, with copies and empty slots."""
        return self.num_devices * self.slots_per_device

    @cached_property
    def _slots(self) -> np.ndarray:
        """The slots of each part, [parts, most replicas], counted through all devices; the first again where fewer."""
        most = max(map(len, self.replicas))
        slots = [[device * self.slots_per_device + slot for device, slot in places] for places in self.replicas]
        return np.array([places + places[:1] * (most - len(places)) for places in slots], np.int32)

    def arrange(self, weights: dict[str, Any]) -> dict[str, Any]:
        """The weights of the experts [E, ...] as those of the slots [P, ...], P = num_slots; empty slots hold zeros.

        With slices, gate and up (and their biases) are cut along F, and down along its inputs; the bias of down stays
        with the first slice, as the slices' results are added up.
        """
        part_of_slot = np.full(self.num_slots, -1)
        for part, places in enumerate(self.replicas):
            for device, slot in places:
                part_of_slot[device * self.slots_per_device + slot] = part

        def of_slots(name: str, weight: Any) -> Array:
            parts = _cut(name, jnp.asarray(weight), self.slices)
            held = jnp.asarray(part_of_slot >= 0).reshape(-1, *(1,) * (parts.ndim - 1))
            return jnp.where(held, parts[np.maximum(part_of_slot, 0)], jnp.zeros((), parts.dtype))

        return {name: of_slots(name, weight) for name, weight in weights.items()}

    def restore(self, weights: dict[str, Any]) -> dict[str, Any]:
        """The opposite: weights of the experts, whole and in their order, from those of the slots."""
        first = self._slots[:, 0]
        return {name: join(name, jnp.asarray(weight)[first], self.slices) for name, weight in weights.items()}

    def assign(
        self, expert: Int[Array, "M X"], gate: Float32[Array, "M X"]
    ) -> tuple[Int[Array, "M Y"], Float32[Array, "M Y"]]:
        """The slots that work for each token, -1 for none, and their gates: Y = X * slices, as every slice has to.

        Copies take turns: token m goes to copy m modulo their number.
        """
        slots = jnp.asarray(self._slots)
        part = expert[..., None] * self.slices + jnp.arange(self.slices, dtype=jnp.int32)[None, None, :]
        part = jnp.where(expert[..., None] >= 0, part, -1).reshape(expert.shape[0], -1)
        known = jnp.maximum(part, 0)
        count = jnp.asarray([len(places) for places in self.replicas], jnp.int32)[known]
        turn = jnp.arange(expert.shape[0], dtype=jnp.int32)[:, None] % count
        slot = jnp.where(part >= 0, slots[known, turn], -1)
        return slot, jnp.repeat(gate, self.slices, axis=1)


def _cut(name: str, weight: Array, slices: int) -> Array:
    """[E, ...] to [E * slices, ...]."""
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


def join(name: str, parts: Array, slices: int) -> Array:
    """Slices that stand one behind the other, [E * slices, ...], as whole experts [E, ...]."""
    apart = parts.reshape(-1, slices, *parts.shape[1:])
    if name == "down_bias":
        return apart[:, 0]  # a sum would do as well: the other slices have zeros
    axis = 2 if name == "down" else 1
    together = jnp.moveaxis(apart, 1, axis)
    return together.reshape(*together.shape[:axis], -1, *together.shape[axis + 2 :])
