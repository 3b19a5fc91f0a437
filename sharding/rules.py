"""Maps logical axes (the letters of `layers/axes.py`) to the axes of a device mesh, for weights and for states.

With weights and states placed so, the compiler partitions the same decoding function over the mesh. The rules of each
parallelism stand apart and are combined with `|`; `RULES` is all of them together. A rule whose mesh axis a mesh does
not have is not used, so `RULES` serves every mesh whose axes are named as in `MESH_AXES`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from decodax.layers.weight import Weight

MESH_AXES = ("data", "pipeline", "context", "expert", "tensor")
COPIES = "tensor_copies"  # a part of the tensor axis over which key-value heads are copied (`sharding/mesh.py`)

# Split over as many devices as there is something for, and held in copies by the rest: few key-value heads serve many
# devices, a batch may be smaller than the mesh, and a decoding step has one token. What a state holds of the vocabulary
# has exactly its size; only weights are padded.
_SPLIT_AS_FAR_AS_IT_GOES = frozenset("BKTSV")

# Axes of weights that zeros fill up where they do not divide, as zeros there change no result: a feature of a gated
# layer that is 0 adds nothing to the product behind it, no token reads a padded row of the embedding, and the logits of
# padded rows of the head are cut off (`Transformer.read_out`). Not heads: each padded one would take its share of the
# cache and of attention, and states that decay or are normed by head are not neutral to zeros. Not experts: routers
# count them, and placements say where they lie (`Placement.contiguous` leaves slots empty). Not the model's width:
# norms divide by it.
_PADDED = frozenset("VF")

_CALLED = {"N": " query heads", "K": " key-value heads", "E": " experts", "L": " layers"}  # in errors


@dataclass(frozen=True)
class Rules:
    """Pairs (letter, mesh axis). A dimension is split by the rule of its first letter; the others are replicated.

    Several mesh axes, as a tuple, split a dimension over all their devices, the first axis coarsest.
    """

    pairs: tuple[tuple[str, str | tuple[str, ...]], ...]

    def __post_init__(self) -> None:
        letters = [letter for letter, _ in self.pairs]
        if len(set(letters)) != len(letters):
            raise ValueError(f"each letter needs one mesh axis, or a tuple of them, got {self.pairs}")

    def __or__(self, other: "Rules") -> "Rules":
        """Both: a letter that both split is split over the axes of this one, then over those of the other."""
        axes = {letter: _names(axis) for letter, axis in self.pairs}
        for letter, axis in other.pairs:
            axes[letter] = (*axes.get(letter, ()), *(name for name in _names(axis) if name not in axes.get(letter, ())))
        return Rules(tuple(axes.items()))

    @property
    def axes(self) -> tuple[str, ...]:
        """All mesh axes that these rules name."""
        return tuple(dict.fromkeys(name for _, axis in self.pairs for name in _names(axis)))

    def mesh_axes(self, mesh: Mesh | AbstractMesh, letter: str, count: int | None = None) -> tuple[str, ...]:
        """The mesh axes over which `count` things of this letter are split (None: any number of them).

        Rows (B), key-value heads (K), tokens (T), slots (S) and what a state holds of the vocabulary (V) are split over
        the first axes, as far as they divide.
        """
        names = tuple(name for name in _names(dict(self.pairs).get(letter)) if name in mesh.axis_names)
        if count is not None and letter in _SPLIT_AS_FAR_AS_IT_GOES:
            while count % num_devices(mesh, names):
                names = names[:-1]
        return names

    def spec(
        self, mesh: Mesh | AbstractMesh, axes: Sequence[str], counts: Sequence[int | None] | None = None
    ) -> PartitionSpec:
        """How an array with these axes is split; a dimension is named by its letters, of which the first decides.

        counts: of each dimension, how many things there are to be split: its size, or the number of heads in it.
        """
        known: Sequence[int | None] = (None,) * len(axes) if counts is None else counts
        names = (self.mesh_axes(mesh, letters[0], count) for letters, count in zip(axes, known, strict=True))
        return PartitionSpec(*(_entry(several) for several in names))

    def sharding(self, mesh: Mesh, weight: Weight, name: str) -> NamedSharding:
        """Where this weight lies on this mesh, which divides it once it is `padded`. Raises as `weight_spec`."""
        return NamedSharding(automatic(mesh), self.weight_spec(mesh, weight, name))

    def weight_spec(self, mesh: Mesh | AbstractMesh, weight: Weight, name: str) -> PartitionSpec:
        """How this weight is split.

        Raises ValueError, naming the weight, when a size does not divide that must not be padded, or two dimensions
        want the same mesh axis.
        """
        axes = (
            tuple("_" if letters != "L" else letters for letters in weight.axes) if weight.replicated else weight.axes
        )
        is_padded = [letters[0] in _PADDED for letters in weight.axes]
        counts = [None if padded else count for padded, count in zip(is_padded, weight.counts, strict=True)]
        spec = self.spec(mesh, axes, counts)
        used = [name for axis in spec for name in _names(axis)]
        if len(set(used)) != len(used):
            raise ValueError(f"{name} (axes {weight.axes}) would use a mesh axis twice: {spec}")
        for letters, count, axis in zip(weight.axes, counts, spec, strict=False):  # a spec may be shorter
            parts = num_devices(mesh, axis)
            if count is not None and count % parts:
                wanted = " x ".join(dict.fromkeys("tensor" if one == COPIES else one for one in _names(axis)))
                raise ValueError(
                    f"{name}: its axis {letters[0]} of {count}{_CALLED.get(letters[0], '')} does not divide over the "
                    f"{parts} devices of mesh axis {wanted}: use a mesh whose {wanted} divides {count}"
                )
        return spec

    def padded(self, mesh: Mesh, weight: Weight) -> Weight:
        """The weight as it is held on this mesh, with zeros at the end of those axes that may be padded."""
        if weight.replicated or not any(letters[0] in _PADDED for letters in weight.axes):
            return weight
        padded = [letters if letters[0] in _PADDED else "_" for letters in weight.axes]
        shape = divided_shape(weight.shape, NamedSharding(automatic(mesh), self.spec(mesh, padded)))
        return weight if shape == weight.shape else replace(weight, shape=shape)


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else axis


def _entry(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """A dimension's part of a spec, written as short as it can be, so that equal specs compare equal."""
    return names if len(names) > 1 else names[0] if names else None


def num_devices(mesh: Mesh | AbstractMesh, axis: str | tuple[str, ...] | None) -> int:
    """Over how many devices a dimension is split that this mesh axis, or these, are to split."""
    return math.prod(mesh.shape[name] for name in _names(axis))


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with automatic partitioning, whatever axis types it has: the model code names no shardings itself."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def divided_shape(shape: tuple[int, ...], sharding: NamedSharding) -> tuple[int, ...]:
    """The smallest shape that holds this one and that the sharding divides."""
    parts = (num_devices(sharding.mesh, axis) for axis in (*sharding.spec, *[None] * len(shape)))
    return tuple(-(-size // count) * count for size, count in zip(shape, parts, strict=False))


def cut(array: Any, shape: tuple[int, ...]) -> Any:
    """An array without the zeros that pad it to more than this shape."""
    return array if array.shape == shape else array[tuple(slice(size) for size in shape)]


def pad(array: Any, shape: tuple[int, ...]) -> Any:
    """An array with zeros at the end of its axes up to this shape."""
    missing = [(0, wanted - size) for wanted, size in zip(shape, array.shape, strict=True)]
    if array.shape == shape:
        return array
    return np.pad(array, missing) if isinstance(array, np.ndarray) else jnp.pad(array, missing)


DATA = Rules((("B", ("data", "expert")),))  # rows of a batch, also over those devices that split experts only
TENSOR = Rules(  # Megatron-LM, arXiv 1909.08053: heads, feed-forward and vocabulary; two sums over devices in a block
    (("N", ("tensor", COPIES)), ("K", ("tensor", COPIES)), ("F", ("tensor", COPIES)), ("V", ("tensor", COPIES)))
)
EXPERT = Rules((("E", "expert"),))  # whole experts
CONTEXT = Rules((("T", "context"), ("S", "context")))  # tokens of a prompt, and slots of a cache
PIPELINE = Rules((("L", "pipeline"),))  # layers
RULES = DATA | TENSOR | EXPERT | CONTEXT | PIPELINE


def place(mesh: Mesh, rules: Rules, array: jax.typing.ArrayLike, weight: Weight, name: str) -> jax.Array:
    """The array on the mesh, padded where it has to be, each device holding its part."""
    sharding = rules.sharding(mesh, weight, name)
    return jax.device_put(pad(array, divided_shape(weight.shape, sharding)), sharding)


def place_tree(mesh: Mesh, rules: Rules, arrays: Any, weights: Any) -> Any:
    """Nested parameters on the mesh, by their equally nested descriptions."""

    def put(path: tuple[Any, ...], weight: Weight, array: jax.typing.ArrayLike) -> jax.Array:
        return place(mesh, rules, array, weight, "/".join(part.key for part in path))

    return jax.tree_util.tree_map_with_path(put, weights, arrays, is_leaf=lambda leaf: isinstance(leaf, Weight))
