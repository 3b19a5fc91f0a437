"""Describes each weight once: its shape, its logical axes and its initialisation.

Shapes for loading, shardings for a mesh and initial values all derive from this description. `fetch` gets the weights,
not linen's own shape check, so that a leaf may later be something other than a plain array (a packed quantised tensor)
with the same logical shape.

Matrices are stored as Hugging Face stores them, [outputs, inputs], and always two-dimensional: a projection kept as
[heads, head size, inputs] was measured at half the decode speed on CPU, because XLA transposes it at every step.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from decodax.core.axes import AXES


@dataclass(frozen=True)
class Weight:
    """The description of one weight.

    axes: the logical axes of each dimension (("NH", "D") for heads x head size by width); a mesh may split a dimension
        along its first logical axis.
    shape: the size of each dimension.
    init: "normal" (divided by the square root of the last dimension, its inputs), "ones" or "zeros".
    replicated: every device that runs the layer holds the full weight; for small weights such as a router's.
    block_size: how many consecutive entries of a dimension with several logical axes belong together, as a head's do;
        a mesh never splits such a block.
    dtype: in which it is always held, such as "float32" for numbers that choose or decay; None for the model's.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    init: Literal["normal", "ones", "zeros"] = "normal"
    replicated: bool = False
    block_size: int = 1
    dtype: str | None = None

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape) or not AXES.issuperset("".join(self.axes)):
            raise ValueError(f"axes must name known logical axes for each dimension, got {self.axes} for {self.shape}")
        if any(
            len(axis_names) > 1 and size % self.block_size
            for axis_names, size in zip(self.axes, self.shape, strict=True)
        ):
            raise ValueError(f"a weight {self.axes} of {self.shape} does not divide into blocks of {self.block_size}")

    @property
    def counts(self) -> tuple[int, ...]:
        """How many items of each dimension a mesh may split: its size, or the number of its blocks."""
        sizes = zip(self.axes, self.shape, strict=True)
        return tuple(size // self.block_size if len(axis_names) > 1 else size for axis_names, size in sizes)

    def dtype_in(self, model_dtype: DTypeLike) -> jnp.dtype:
        """The dtype of this weight in a model of that dtype."""
        return jnp.dtype(model_dtype if self.dtype is None else self.dtype)

    def initial(self, key: Array, dtype: DTypeLike = jnp.float32) -> Array:
        """An initial value of this weight."""
        dtype = self.dtype_in(dtype)
        if self.init == "normal":
            return (jax.random.normal(key, self.shape) * self.shape[-1] ** -0.5).astype(dtype)
        return (jnp.ones if self.init == "ones" else jnp.zeros)(self.shape, dtype)


def named_weights(weights: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Weight]]:
    """The weights of a nested description, with names as in "mixer/query"."""
    for name, value in weights.items():
        if isinstance(value, Weight):
            yield prefix + name, value
        else:
            yield from named_weights(value, f"{prefix}{name}/")


Padded = Callable[[Weight], Weight]


def fetch_own(module: nn.Module, described: Mapping[str, Any], padded: Padded | None = None) -> dict[str, Array]:
    """The values of all weights directly in `described`; nested ones belong to submodules."""
    weights = {name: weight for name, weight in described.items() if isinstance(weight, Weight)}
    return {name: fetch(module, name, weight, padded) for name, weight in weights.items()}


def fetch(module: nn.Module, name: str, weight: Weight, padded: Padded | None = None) -> Array:
    """The value of a module's weight, checked against its description; creates it during `init`.

    module: whose parameters hold the weight.
    name: of the weight among them.
    weight: its description.
    padded: `Execution.padded` where zeros at the end of some axes do not change the module's result.
    Raises ValueError when the leaf is missing, or its shape is not that of the description, padded or not.
    """
    if module.is_initializing():
        return module.param(name, weight.initial)
    leaf = module.get_variable("params", name)
    where = "/".join((*module.path, name))
    if leaf is None:
        raise ValueError(f"the parameters have no weight {where}: expected shape {weight.shape} (axes {weight.axes})")
    if tuple(leaf.shape) != weight.shape and (padded is None or tuple(leaf.shape) != padded(weight).shape):
        raise ValueError(f"weight {where} must have shape {weight.shape} (axes {weight.axes}), got {tuple(leaf.shape)}")
    return leaf
