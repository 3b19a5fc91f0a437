"""Checks that a model divides over a mesh, and names meshes that would work if it does not.

mesh_for("tensor=8", config)    # 9 query heads: refused, with the meshes of these devices that divide them
"""

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from decodax.core.weight import Weight, named_weights
from decodax.models.config import ModelConfig
from decodax.models.key_value_copies import fit_mesh, fit_sizes
from decodax.sharding.mesh import mesh_text, read_mesh
from decodax.sharding.rules import COPIES, MESH_AXES, RULES, Rules

SHOWN = 4  # meshes that would work
# The logical axis that each mesh axis shards and must divide; rows and cache slots are sharded only if they divide.
_SHARDED_AXES = {"expert": "E", "tensor": "N"}


def mesh_for(mesh: Any, config: ModelConfig, rules: Rules = RULES) -> Mesh:
    """The mesh that a text describes, or a JAX mesh, fitted to the model (`fit_mesh`).

    Raises ValueError for what is no mesh, for axes in no sharding rule, and for a mesh over which the model does not
    divide, naming some that would work.
    """
    mesh = read_mesh(mesh) if isinstance(mesh, str) else mesh
    _check_devices(mesh)
    _check_axes(mesh, rules)
    reason = unsupported_reason(config, dict(mesh.shape), rules)
    if reason is not None:
        raise ValueError(f"{reason}{_advice(config, mesh, rules)}")
    return fit_mesh(mesh, config)


def _check_devices(mesh: Any) -> None:
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh must be a text like 'tensor=4,data=2', a jax.sharding.Mesh or None, got {type(mesh).__name__}"
        )
    if mesh.size == 0:
        raise ValueError(f"a mesh needs at least one device, got one with the axes {mesh.axis_names} and none")
    devices = list(mesh.devices.flat)
    twice = [device for device in devices if devices.count(device) > 1]
    if twice:
        raise ValueError(f"a mesh must hold each device once, got {twice[0]} {devices.count(twice[0])} times")


def _check_axes(mesh: Mesh, rules: Rules) -> None:
    """Raises ValueError for an axis that nothing is sharded over, which would replicate the model on its devices."""
    known = dict.fromkeys((*MESH_AXES, COPIES, *rules.axes))
    unknown = [f"{name} (of {size})" for name, size in mesh.shape.items() if size > 1 and name not in known]
    if unknown:
        raise ValueError(
            f"no rule splits anything over the mesh axis {', '.join(unknown)}, so each of its devices would hold the "
            f"whole model: name the axes of the mesh {', '.join(name for name in known if name != COPIES)}, or pass "
            "rules that name yours, as in rules=Rules((('N', 'model'), ('K', 'model'), ('F', 'model'), ('V', 'model')))"
        )


def unsupported_reason(config: ModelConfig, sizes: Mapping[str, int], rules: Rules = RULES) -> str | None:
    """Why the weights do not divide over mesh axes of these sizes, naming the first that does not; None if all do."""
    fitted = fit_sizes(sizes, config)
    mesh = AbstractMesh(tuple(fitted.values()), tuple(fitted))
    for name, weight in _distinct_weights(config):
        try:
            rules.weight_spec(mesh, weight, name)
        except ValueError as error:
            return str(error)
    return None


@lru_cache(maxsize=16)  # a planner asks for every mesh
def _distinct_weights(config: ModelConfig) -> tuple[tuple[str, Weight], ...]:
    """The weights around the layers, and those of the first layer of each kind."""
    found = [*named_weights(replace(config, blocks=()).weights())]
    for block in dict.fromkeys(config.blocks):
        found += named_weights(block.weights(config.hidden_size), f"blocks_{config.blocks.index(block)}/")
    return tuple(found)


def suitable_meshes(config: ModelConfig, num_devices: int, axes: Collection[str]) -> list[dict[str, int]]:
    """Sizes of these mesh axes, and of data, that the model divides over with up to `num_devices` devices.

    Those that use the most devices come first, and among them those that shard the weights the most.
    """
    degrees = {
        axis: _degrees(config, axis, num_devices) for axis in MESH_AXES if axis in axes and axis in _SHARDED_AXES
    }
    found = []
    for chosen in itertools.product(*degrees.values()):
        data = num_devices // math.prod(chosen)
        sizes = {"data": data} | dict(zip(degrees, chosen, strict=True))
        if data and unsupported_reason(config, sizes) is None:
            found.append({axis: size for axis, size in sizes.items() if size > 1} or {"data": 1})
    return sorted(found, key=lambda sizes: (-math.prod(sizes.values()), sizes.get("data", 1)))


def _degrees(config: ModelConfig, axis: str, num_devices: int) -> list[int]:
    """The numbers of devices over which this mesh axis may shard its logical axis."""
    axis_name = _SHARDED_AXES[axis]
    counts = [
        count
        for _, weight in _distinct_weights(config)
        for axis_names, count in zip(weight.axes, weight.counts, strict=True)
        if axis_names[0] == axis_name and not weight.replicated
    ]
    if axis == "expert" and not counts:
        return [1]
    return [degree for degree in range(1, num_devices + 1) if math.gcd(*counts, 0) % degree == 0]


def _advice(config: ModelConfig, mesh: Mesh, rules: Rules) -> str:
    if rules != RULES:
        return ""
    meshes = suitable_meshes(config, mesh.size, mesh.axis_names)[:SHOWN]
    listed = [mesh_text(sizes) + _share(math.prod(sizes.values()), mesh.size) for sizes in meshes]
    return f". Of these {mesh.size} devices these meshes would work: {'; '.join(listed)}"


def _share(used: int, num_devices: int) -> str:
    return "" if used == num_devices else f" with {used} of them"
