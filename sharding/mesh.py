"""Makes a mesh of devices from a line of text.

read_mesh("tensor=4,data=2")    two groups of four devices; the last of MESH_AXES are the closest neighbours
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from decodax.sharding.rules import MESH_AXES


class IdleDevicesWarning(UserWarning):
    """A mesh uses only some of the devices; the others are idle."""


def read_mesh_shape(text: str) -> dict[str, int]:
    """The sizes of the axes that a text like "tensor=4,data=2" names, in the order of MESH_AXES.

    Raises ValueError for an unknown name, a repeated name, and a size that is no whole number from 1 on.

    >>> read_mesh_shape("tensor=4,data=2")
    {'data': 2, 'tensor': 4}
    """
    sizes: dict[str, int] = {}
    for entry in text.split(","):
        name, _, size = (piece.strip() for piece in entry.partition("="))
        if name not in MESH_AXES:
            raise ValueError(f"a mesh has axes {', '.join(MESH_AXES)}, as in tensor=4,data=2; got {entry.strip()!r}")
        if name in sizes:
            raise ValueError(f"the mesh {text!r} names the axis {name} twice")
        if not (size.isascii() and size.isdigit() and int(size) > 0):
            raise ValueError(f"the size of a mesh axis must be a whole number from 1 on, got {entry.strip()!r}")
        sizes[name] = int(size)
    return {name: sizes[name] for name in MESH_AXES if name in sizes}


def read_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that a text like "tensor=4,data=2" describes, over these devices, by default all there are.

    Neighbouring devices are along the last axis, tensor; a TPU's mesh follows its network. A mesh of fewer devices than
    there are uses the first ones, and warns with IdleDevicesWarning.

    Raises ValueError when there are too few devices, when devices of several processes would be left out, and for text
    that is no mesh.
    """
    sizes = read_mesh_shape(text)
    devices = jax.devices() if devices is None else devices
    num_requested, num_devices = math.prod(sizes.values()), len(devices)
    is_shared = len({device.process_index for device in devices}) > 1
    if num_requested > num_devices or (num_requested < num_devices and is_shared):
        kind, verb = f"{devices[0].platform} device{'s' if num_devices > 1 else ''}", "are" if num_devices > 1 else "is"
        is_cpu = devices[0].platform == "cpu"
        hint = f": set JAX_NUM_CPU_DEVICES={num_requested} in the environment to simulate them" if is_cpu else ""
        processes = ", all of which several processes must use" if is_shared else hint
        raise ValueError(
            f"the mesh {text!r} needs {num_requested} devices, and there {verb} {num_devices} {kind}{processes}"
        )
    kinds = (AxisType.Auto,) * len(sizes)
    if num_requested < num_devices:
        idle = f"{num_devices - num_requested} of {num_devices} {devices[0].platform} devices idle"
        warnings.warn(f"the mesh {text!r} leaves {idle}", IdleDevicesWarning, stacklevel=2)
        # Some chips of a TPU's network need not form a grid, so the mesh cannot follow it.
        used = np.asarray(devices[:num_requested]).reshape(tuple(sizes.values()))
        return Mesh(used, tuple(sizes), axis_types=kinds)
    # By itself JAX refuses to split an axis of a larger TPU's network between two axes of a mesh.
    placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(sizes), axis_types=kinds)


def mesh_text(sizes: Mapping[str, int]) -> str:
    """The text that `read_mesh` takes, for sizes in the order of MESH_AXES.

    >>> mesh_text({"data": 2, "tensor": 4})
    'tensor=4,data=2'
    """
    return ",".join(f"{name}={size}" for name, size in reversed(list(sizes.items())))
