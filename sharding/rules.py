"""Maps logical axes (the letters of `layers/axes.py`) to the axes of a device mesh, for weights and for states.

With weights and states placed so, the compiler partitions the same decoding function over the mesh. The rules of each
parallelism stand apart and are combined with `|`; `RULES` is all of them together. A rule whose mesh axis a mesh does
not have is not used, so `RULES` serves every mesh whose axes are named as in `MESH_AXES`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from decodax.layers.weight import Weight

MESH_AXES = ("data", "pipeline", "context", "expert", "tensor")
COPIES = "tensor_copies"  # a part of the tensor axis over which key-value heads are copied (`sharding/mesh.py`)

# Split over as many devices as there is something for, and held in copies by the rest: few key-value heads serve many
# devices, a batch may be smaller than the mesh, and a decoding step has one token.
_SPLIT_AS_FAR_AS_IT_GOES = frozenset("BKTS")


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

    def mesh_axes(self, mesh: Mesh, letter: str, count: int | None = None) -> tuple[str, ...]:
        """The mesh axes over which `count` things of this letter are split (None: any number of them).

        Rows (B), key-value heads (K), tokens (T) and slots (S) are split over the first axes, as far as they divide.
        """
        names = tuple(name for name in _names(dict(self.pairs).get(letter)) if name in mesh.axis_names)
        if count is not None and letter in _SPLIT_AS_FAR_AS_IT_GOES:
            while count % num_devices(mesh, names):
                names = names[:-1]
        return names

    def spec(self, mesh: Mesh, axes: Sequence[str], counts: Sequence[int | None] | None = None) -> PartitionSpec:
        """How an array with these axes is split; a dimension is named by its letters, of which the first decides.

        counts: of each dimension, how many things there are to be split: its size, or the number of heads in it.
        """
        known: Sequence[int | None] = (None,) * len(axes) if counts is None else counts
        names = (self.mesh_axes(mesh, letters[0], count) for letters, count in zip(axes, known, strict=True))
        return PartitionSpec(*(_entry(several) for several in names))

    def sharding(self, mesh: Mesh, weight: Weight, name: str) -> NamedSharding:
        """Where this weight lies on this mesh.

        Raises ValueError, naming the weight, when a size does not divide or two dimensions want the same mesh axis.
        """
        axes = (
            tuple("_" if letters != "L" else letters for letters in weight.axes) if weight.replicated else weight.axes
        )
        spec = self.spec(mesh, axes, weight.counts)
        used = [name for axis in spec for name in _names(axis)]
        if len(set(used)) != len(used):
            raise ValueError(f"{name} (axes {weight.axes}) would use a mesh axis twice: {spec}")
        for letters, count, axis in zip(weight.axes, weight.counts, spec, strict=False):  # a spec may be shorter
            parts = num_devices(mesh, axis)
            if count % parts:
                wanted = " x ".join(_names(axis))
                raise ValueError(
                    f"{name}: its axis {letters[0]} of {count} does not divide over the {parts} devices of mesh axis "
                    f"{wanted}: use a mesh whose {wanted} divides {count}"
                )
        return NamedSharding(automatic(mesh), spec)


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else axis


def _entry(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """A dimension's part of a spec, written as short as it can be, so that equal specs compare equal."""
    return names if len(names) > 1 else names[0] if names else None


def num_devices(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
    """Over how many devices a dimension is split that this mesh axis, or these, are to split."""
    return math.prod(mesh.shape[name] for name in _names(axis))


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with automatic partitioning, whatever axis types it has: the model code names no shardings itself."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


DATA = Rules((("B", ("data", "expert")),))  # rows of a batch, also over those devices that split experts only
TENSOR = Rules(  # Megatron-LM, arXiv 1909.08053: heads, feed-forward and vocabulary; two sums over devices in a block
    (("N", ("tensor", COPIES)), ("K", ("tensor", COPIES)), ("F", ("tensor", COPIES)), ("V", ("tensor", COPIES)))
)
EXPERT = Rules((("E", "expert"),))  # whole experts
CONTEXT = Rules((("T", "context"), ("S", "context")))  # tokens of a prompt, and slots of a cache
PIPELINE = Rules((("L", "pipeline"),))  # layers
RULES = DATA | TENSOR | EXPERT | CONTEXT | PIPELINE


def place(mesh: Mesh, rules: Rules, array: jax.typing.ArrayLike, weight: Weight, name: str) -> jax.Array:
    """The array on the mesh, each device holding its part."""
    return jax.device_put(array, rules.sharding(mesh, weight, name))


def place_tree(mesh: Mesh, rules: Rules, arrays: Any, weights: Any) -> Any:
    """Nested parameters on the mesh, by their equally nested descriptions."""

    def put(path: tuple[Any, ...], weight: Weight, array: jax.typing.ArrayLike) -> jax.Array:
        return place(mesh, rules, array, weight, "/".join(part.key for part in path))

    return jax.tree_util.tree_map_with_path(put, weights, arrays, is_leaf=lambda leaf: isinstance(leaf, Weight))
