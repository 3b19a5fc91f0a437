"""Meshes of devices from a line of text, and fitted to a model.

read_mesh("tensor=4,data=2")    two groups of four devices; the last of MESH_AXES are the closest neighbours
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from decodax.layers.weight import Weight
from decodax.models.config import ModelConfig
from decodax.sharding.rules import COPIES, MESH_AXES, automatic


def read_mesh_shape(text: str) -> dict[str, int]:
    """The sizes of the axes that a text like "tensor=4,data=2" names, in the order of MESH_AXES.

    Raises ValueError for a name that is no axis, one that comes twice, and a size that is no whole number from 1 on.

    >>> read_mesh_shape("tensor=4,data=2")
    {'data': 2, 'tensor': 4}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in MESH_AXES:
            raise ValueError(f"a mesh has axes {', '.join(MESH_AXES)}, as in tensor=4,data=2; got {part.strip()!r}")
        if name in sizes:
            raise ValueError(f"the mesh {text!r} names the axis {name} twice")
        if not (size.isascii() and size.isdigit() and int(size) > 0):
            raise ValueError(f"the size of a mesh axis must be a whole number from 1 on, got {part.strip()!r}")
        sizes[name] = int(size)
    return {name: sizes[name] for name in MESH_AXES if name in sizes}


def read_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that a text like "tensor=4,data=2" describes, over these devices, by default all there are.

    Devices that work most closely together stand along the last axis, tensor; a TPU's mesh follows its network.

    Raises ValueError when the sizes do not multiply to the number of devices, and for text that is no mesh.
    """
    sizes = read_mesh_shape(text)
    devices = jax.devices() if devices is None else devices
    wanted, found = math.prod(sizes.values()), len(devices)
    if wanted != found:
        kind, verb = f"{devices[0].platform} device{'s' if found > 1 else ''}", "are" if found > 1 else "is"
        is_cpu = devices[0].platform == "cpu"
        hint = f": with JAX_NUM_CPU_DEVICES={wanted} in the environment a CPU counts as so many" if is_cpu else ""
        raise ValueError(f"the mesh {text!r} needs {wanted} devices, and there {verb} {found} {kind}{hint}")
    kinds = (AxisType.Auto,) * len(sizes)
    # By itself JAX refuses to split an axis of a larger TPU's network between two axes of a mesh.
    placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(sizes), axis_types=kinds)


def fit_mesh(mesh: Mesh, config: ModelConfig) -> Mesh:
    """The mesh for this model: its axis "tensor" in two, where there are fewer key-value heads than it has devices.

    Key-value heads are then split over "tensor" and copied over "tensor_copies", and query heads split over both, so
    that each device has the key-value head that its query heads read. The devices stay where they are.
    """
    if "tensor" not in mesh.axis_names or COPIES in mesh.axis_names:
        return automatic(mesh)
    degree = mesh.shape["tensor"]
    shared = {math.gcd(heads, degree) for heads in _key_value_heads(config)} - {1}
    split = min(shared, default=degree)
    if split == degree:
        return automatic(mesh)
    place = mesh.axis_names.index("tensor")
    names = (*mesh.axis_names[: place + 1], COPIES, *mesh.axis_names[place + 1 :])
    sizes = [mesh.shape[name] for name in mesh.axis_names]
    devices = np.asarray(mesh.devices).reshape(*sizes[:place], split, degree // split, *sizes[place + 1 :])
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def _key_value_heads(config: ModelConfig) -> set[int]:
    """Of every layer that has some."""

    def heads(weights: dict) -> set[int]:
        found: set[int] = set()
        for value in weights.values():
            if isinstance(value, Weight):
                counts = zip(value.axes, value.counts, strict=True)
                found |= {n for letters, n in counts if letters[0] == "K" and (letters == "K" or value.whole > 1)}
            else:
                found |= heads(value)
        return found

    return heads(config.weights())
