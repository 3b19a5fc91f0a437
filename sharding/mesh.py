"""Meshes of devices from a line of text, and fitted to a model.

read_mesh("tensor=4,data=2")    two groups of four devices; the last of MESH_AXES are the closest neighbours
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from decodax.layers.weight import Weight
from decodax.models.config import ModelConfig
from decodax.sharding.rules import COPIES, MESH_AXES, automatic


class IdleDevicesWarning(UserWarning):
    """A mesh takes a part of the devices, and the others do nothing."""


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

    With fewer devices than there are it takes the first, and warns with IdleDevicesWarning.
    Raises ValueError when there are too few devices, when devices of several processes would be left out, and for text
    that is no mesh.
    """
    sizes = read_mesh_shape(text)
    devices = jax.devices() if devices is None else devices
    wanted, found = math.prod(sizes.values()), len(devices)
    is_shared = len({device.process_index for device in devices}) > 1
    if wanted > found or (wanted < found and is_shared):
        kind, verb = f"{devices[0].platform} device{'s' if found > 1 else ''}", "are" if found > 1 else "is"
        is_cpu = devices[0].platform == "cpu"
        hint = f": with JAX_NUM_CPU_DEVICES={wanted} in the environment a CPU counts as so many" if is_cpu else ""
        processes = ", all of which several processes must use" if is_shared else hint
        raise ValueError(f"the mesh {text!r} needs {wanted} devices, and there {verb} {found} {kind}{processes}")
    kinds = (AxisType.Auto,) * len(sizes)
    if wanted < found:
        idle = f"{found - wanted} of {found} {devices[0].platform} devices idle"
        warnings.warn(f"the mesh {text!r} leaves {idle}", IdleDevicesWarning, stacklevel=2)
        # A part of a TPU's network need not be a grid, so there is nothing to follow.
        taken = np.asarray(devices[:wanted]).reshape(tuple(sizes.values()))
        return Mesh(taken, tuple(sizes), axis_types=kinds)
    # By itself JAX refuses to split an axis of a larger TPU's network between two axes of a mesh.
    placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(sizes), axis_types=kinds)


def fit_mesh(mesh: Mesh, config: ModelConfig) -> Mesh:
    """The mesh for this model: its axis "tensor" in two, where there are fewer key-value heads than it has devices.

    Key-value heads are then split over "tensor" and copied over "tensor_copies", and query heads split over both, so
    that each device has the key-value head that its query heads read. The devices stay where they are.
    """
    fitted = fit_sizes(mesh.shape, config)
    if tuple(fitted) == mesh.axis_names:
        return automatic(mesh)
    devices = np.asarray(mesh.devices).reshape(tuple(fitted.values()))
    return Mesh(devices, tuple(fitted), axis_types=(AxisType.Auto,) * len(fitted))


def fit_sizes(sizes: Mapping[str, int], config: ModelConfig) -> dict[str, int]:
    """The sizes of the axes of such a mesh, in order, as `fit_mesh` makes them."""
    degree = sizes.get("tensor", 1)
    shared = {math.gcd(heads, degree) for heads in _key_value_heads(config)} - {1}
    split = min(shared, default=degree)
    if split == degree or COPIES in sizes:
        return dict(sizes)
    fitted: dict[str, int] = {}
    for name, size in sizes.items():
        fitted |= {name: split, COPIES: degree // split} if name == "tensor" else {name: size}
    return fitted


def mesh_text(sizes: Mapping[str, int]) -> str:
    """The text that `read_mesh` takes, for sizes in the order of MESH_AXES.

    >>> mesh_text({"data": 2, "tensor": 4})
    'tensor=4,data=2'
    """
    return ",".join(f"{name}={size}" for name, size in reversed(list(sizes.items())))


@lru_cache(maxsize=16)  # a planner asks for every mesh
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

    return heads(replace(config, blocks=tuple(dict.fromkeys(config.blocks))).weights())
