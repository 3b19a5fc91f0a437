"""Maps the logical axes of weights (the letters of `layers/axes.py`) to the axes of a device mesh.

With weights placed so, the compiler partitions the same decoding function over the mesh. `TENSOR` is Megatron's layout
(arXiv 1909.08053): heads, feed-forward and vocabulary are split, so each block needs two sums over devices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from decodax.layers.weight import Weight


@dataclass(frozen=True)
class Rules:
    """Pairs (letter, mesh axis). A dimension is split by the rule of its first letter; the others are replicated.

    Several mesh axes, as a tuple, split a dimension over all their devices, the first axis coarsest.
    """

    pairs: tuple[tuple[str, str | tuple[str, ...]], ...]

    def __post_init__(self) -> None:
        letters = [letter for letter, _ in self.pairs]
        if len(set(letters)) != len(letters):
            raise ValueError(f"each letter needs one mesh axis, got {self.pairs}")

    def spec(self, mesh: Mesh, axes: Sequence[str]) -> PartitionSpec:
        """How an array with these axes is split; a dimension is named by its letters, of which the first decides."""
        rules = {letter: axis for letter, axis in self.pairs if set(_names(axis)) <= set(mesh.axis_names)}
        return PartitionSpec(*(rules.get(letters[0]) for letters in axes))

    def sharding(self, mesh: Mesh, weight: Weight, name: str) -> NamedSharding:
        """Where this weight lies on this mesh; rules for axes that the mesh does not have are not used.

        Raises ValueError, naming the weight, when a size does not divide or two dimensions want the same mesh axis.
        """
        spec = PartitionSpec() if weight.replicated else self.spec(mesh, weight.axes)
        used = [name for axis in spec for name in _names(axis)]
        if len(set(used)) != len(used):
            raise ValueError(f"{name} (axes {weight.axes}) would use a mesh axis twice: {spec}")
        for size, axis, letters in zip(weight.shape, spec, weight.axes, strict=False):  # a spec may be shorter
            parts = num_devices(mesh, axis)
            if size % parts:
                raise ValueError(
                    f"{name}: its axis {letters} of {size} does not divide over the {parts} devices of mesh axis "
                    f"{axis!r}: use a mesh with another size of {axis!r}"
                )
        return NamedSharding(automatic(mesh), spec)


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else axis


def num_devices(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
    """Over how many devices a dimension is split that this mesh axis, or these, are to split."""
    return math.prod(mesh.shape[name] for name in _names(axis))


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with automatic partitioning, whatever axis types it has: the model code names no shardings itself."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


TENSOR = Rules((("N", "tensor"), ("K", "tensor"), ("F", "tensor"), ("V", "tensor")))


def place(mesh: Mesh, rules: Rules, array: jax.typing.ArrayLike, weight: Weight, name: str) -> jax.Array:
    """The array on the mesh, each device holding its part."""
    return jax.device_put(array, rules.sharding(mesh, weight, name))
