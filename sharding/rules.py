"""Maps logical axes (those of `core/axes.py`) to the axes of a device mesh, for weights and for states.

With weights and states sharded by these rules, the compiler partitions the same decoding function over the mesh. Each
parallelism has its own rules, combined with `|`; `RULES` is all of them together. A rule is ignored on a mesh without
its axis, so `RULES` fits every mesh whose axes are named as in `MESH_AXES`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from decodax.core.weight import Weight

MESH_AXES = ("data", "pipeline", "context", "expert", "tensor")
COPIES = "tensor_copies"  # factor of the tensor axis that copies key-value heads (`models/key_value_copies.py`)

# Split over those mesh axes that divide the number of items, replicated over the others: few key-value heads serve
# many devices, a batch may be smaller than the mesh, and a decoding step has one token. Arrays of a state over the
# vocabulary have exactly its size; only weights are padded.
_SPLIT_IF_DIVISIBLE = frozenset("BKTSV")

# Axes of weights that are padded with zeros where they do not divide, as zeros there change no result: a feature of a
# gated layer that is 0 adds nothing to the next product, no token uses a padded entry of the embedding, and the logits
# of padded entries of the head are cut off (`Transformer.read_out`). Not heads: each padded one would use memory of the
# cache and time of attention, and zeros change states that decay or are normed by head. Not experts: routers count
# them, and placements give their slots (`Placement.contiguous` leaves slots empty). Not the model's width: norms divide
# by it.
_PADDED = frozenset("VF")

_ITEM_NAMES = {"N": " query heads", "K": " key-value heads", "E": " experts", "L": " layers"}  # in errors


@dataclass(frozen=True)
class Rules:
    """Rules that split a dimension by its first logical axis; axes without a rule are replicated.

    pairs: (logical axis, mesh axis). A tuple of mesh axes splits a dimension over all their devices, the first axis
        coarsest.
    """

    pairs: tuple[tuple[str, str | tuple[str, ...]], ...]

    def __post_init__(self) -> None:
        axis_names = [axis_name for axis_name, _ in self.pairs]
        if len(set(axis_names)) != len(axis_names):
            raise ValueError(f"pairs must name each logical axis once, with one mesh axis or a tuple, got {self.pairs}")

    def __or__(self, other: "Rules") -> "Rules":
        """Both rules: an axis that both split is split over the mesh axes of this one, then over those of the other."""
        axes = {axis_name: _names(axis) for axis_name, axis in self.pairs}
        for axis_name, axis in other.pairs:
            axes[axis_name] = (
                *axes.get(axis_name, ()),
                *(name for name in _names(axis) if name not in axes.get(axis_name, ())),
            )
        return Rules(tuple(axes.items()))

    @property
    def axes(self) -> tuple[str, ...]:
        """All mesh axes in these rules."""
        return tuple(dict.fromkeys(name for _, axis in self.pairs for name in _names(axis)))

    def mesh_axes(self, mesh: Mesh | AbstractMesh, axis_name: str, count: int | None = None) -> tuple[str, ...]:
        """The mesh axes over which `count` items of this logical axis are split (None: any number of them).

        Rows (B), key-value heads (K), tokens (T), slots (S) and a state's axis of the vocabulary (V) are split over
        the longest prefix of the mesh axes that divides their number.
        """
        names = tuple(name for name in _names(dict(self.pairs).get(axis_name)) if name in mesh.axis_names)
        if count is not None and axis_name in _SPLIT_IF_DIVISIBLE:
            while count % num_devices(mesh, names):
                names = names[:-1]
        return names

    def spec(
        self, mesh: Mesh | AbstractMesh, axes: Sequence[str], counts: Sequence[int | None] | None = None
    ) -> PartitionSpec:
        """The partition spec of an array.

        mesh: of the devices.
        axes: logical axes of each dimension; the first one decides.
        counts: items to split of each dimension: its size, or the number of heads in it.
        """
        known: Sequence[int | None] = (None,) * len(axes) if counts is None else counts
        names = (self.mesh_axes(mesh, axis_names[0], count) for axis_names, count in zip(axes, known, strict=True))
        return PartitionSpec(*(_entry(several) for several in names))

    def sharding(self, mesh: Mesh, weight: Weight, name: str) -> NamedSharding:
        """The sharding of this weight, whose `padded` shape it divides. Raises as `weight_spec`."""
        return NamedSharding(automatic(mesh), self.weight_spec(mesh, weight, name))

    def weight_spec(self, mesh: Mesh | AbstractMesh, weight: Weight, name: str) -> PartitionSpec:
        """The partition spec of this weight.

        Raises ValueError, naming the weight, when a size that must not be padded does not divide, or two dimensions
        need the same mesh axis.
        """
        axes = (
            tuple("_" if axis_names != "L" else axis_names for axis_names in weight.axes)
            if weight.replicated
            else weight.axes
        )
        is_padded = [axis_names[0] in _PADDED for axis_names in weight.axes]
        counts = [None if padded else count for padded, count in zip(is_padded, weight.counts, strict=True)]
        spec = self.spec(mesh, axes, counts)
        used = [name for axis in spec for name in _names(axis)]
        if len(set(used)) != len(used):
            raise ValueError(f"{name} (axes {weight.axes}) would use a mesh axis twice: {spec}")
        for axis_names, count, axis in zip(weight.axes, counts, spec, strict=False):  # a spec may be shorter
            num_shards = num_devices(mesh, axis)
            if count is not None and count % num_shards:
                mesh_axis = " x ".join(dict.fromkeys("tensor" if one == COPIES else one for one in _names(axis)))
                raise ValueError(
                    f"{name}: its axis {axis_names[0]} of {count}{_ITEM_NAMES.get(axis_names[0], '')} does not divide "
                    f"over the {num_shards} devices of mesh axis {mesh_axis}: use a mesh whose {mesh_axis} "
                    f"divides {count}"
                )
        return spec

    def padded(self, mesh: Mesh, weight: Weight) -> Weight:
        """The weight as this mesh holds it, with zeros at the end of those axes that may be padded."""
        if weight.replicated or not any(axis_names[0] in _PADDED for axis_names in weight.axes):
            return weight
        padded = [axis_names if axis_names[0] in _PADDED else "_" for axis_names in weight.axes]
        shape = divided_shape(weight.shape, NamedSharding(automatic(mesh), self.spec(mesh, padded)))
        return weight if shape == weight.shape else replace(weight, shape=shape)


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else axis


def _entry(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """A dimension's entry of a spec in its shortest form, so that equal specs compare equal."""
    return names if len(names) > 1 else names[0] if names else None


def num_devices(mesh: Mesh | AbstractMesh, axis: str | tuple[str, ...] | None) -> int:
    """The number of devices along this mesh axis, or these."""
    return math.prod(mesh.shape[name] for name in _names(axis))


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with automatic partitioning, whatever its axis types: model code names no shardings."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def divided_shape(shape: tuple[int, ...], sharding: NamedSharding) -> tuple[int, ...]:
    """The smallest shape that holds this one and that the sharding divides."""
    shards = (num_devices(sharding.mesh, axis) for axis in (*sharding.spec, *[None] * len(shape)))
    return tuple(-(-size // count) * count for size, count in zip(shape, shards, strict=False))


def cut(array: Any, shape: tuple[int, ...]) -> Any:
    """An array without the zeros that pad it to more than this shape."""
    return array if array.shape == shape else array[tuple(slice(size) for size in shape)]


def pad(array: Any, shape: tuple[int, ...]) -> Any:
    """An array with zeros at the end of its axes up to this shape."""
    missing = [(0, target - size) for target, size in zip(shape, array.shape, strict=True)]
    if array.shape == shape:
        return array
    return np.pad(array, missing) if isinstance(array, np.ndarray) else jnp.pad(array, missing)


DATA = Rules((("B", ("data", "expert")),))  # rows of a batch, also over devices that split only experts
TENSOR = Rules(  # Megatron-LM, arXiv 1909.08053: heads, feed-forward and vocabulary; two all-reduces per block
    (("N", ("tensor", COPIES)), ("K", ("tensor", COPIES)), ("F", ("tensor", COPIES)), ("V", ("tensor", COPIES)))
)
EXPERT = Rules((("E", "expert"),))  # each expert on one device
CONTEXT = Rules((("T", "context"), ("S", "context")))  # tokens of a prompt, slots of a cache
PIPELINE = Rules((("L", "pipeline"),))  # layers
RULES = DATA | TENSOR | EXPERT | CONTEXT | PIPELINE


def place(mesh: Mesh, rules: Rules, array: jax.typing.ArrayLike, weight: Weight, name: str) -> jax.Array:
    """The array sharded over the mesh, padded where the mesh does not divide it.

    mesh, rules: as in `Rules.sharding`.
    array: of the weight's shape.
    weight: its description.
    name: of the weight, for errors.
    """
    sharding = rules.sharding(mesh, weight, name)
    return jax.device_put(pad(array, divided_shape(weight.shape, sharding)), sharding)


def place_tree(mesh: Mesh, rules: Rules, arrays: Any, weights: Any) -> Any:
    """Nested parameters sharded over the mesh.

    mesh, rules: as in `Rules.sharding`.
    arrays: the parameters.
    weights: their descriptions, equally nested.
    """

    def put(path: tuple[Any, ...], weight: Weight, array: jax.typing.ArrayLike) -> jax.Array:
        return place(mesh, rules, array, weight, "/".join(entry.key for entry in path))

    return jax.tree_util.tree_map_with_path(put, weights, arrays, is_leaf=lambda leaf: isinstance(leaf, Weight))
