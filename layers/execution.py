"""How layers compute, apart from what they compute: which kernels run, and over which devices."""

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from decodax.kernels_pallas.choice import Implementation, backend_of_this_device
from decodax.layers.weight import Weight
from decodax.sharding import layout
from decodax.sharding.context import Way
from decodax.sharding.pipeline import ONE_CHUNK, Pipeline
from decodax.sharding.regions import mesh_here, on_each_device
from decodax.sharding.rules import RULES, Rules, automatic, num_devices

TILE_TOKENS = 128  # slots of a cache that kernels read at a time
STEP_TOKENS = 64  # new tokens up to which a forward is a decoding step or a small tree, and all devices have them all
_TOKENS = "TS"  # a kernel gets all tokens and all slots of its rows and heads


@dataclass(frozen=True)
class Execution:
    """implementation: of the kernels (`kernels_pallas/choice.py`); None takes those made for this process's device.

    mesh, rules: the devices that weights and states are split over, and how. A kernel runs on each device's part, so
    heads have to divide over them.

    scatter_norms: between the parts of a block, tokens are split over the devices that split heads, too. So the sum
    after a part becomes a reduce-scatter, norms and sums run on each device's share, and what is normed is gathered for
    the next part (TokenWeave, arXiv 2505.11329, without its fused kernel).

    experts: how the experts of a mixture run: a name of METHODS in `layers/moe/experts/`, one of its objects, or None
    for the one that suits the devices and the number of tokens.

    context: how the tokens of a prompt read each other that are split over devices, "ring" or "ulysses"; None for the
    one that sends less (`sharding/context.py`).

    pipeline: how layers are dealt out to stages, and rows to micro-batches, where the mesh has an axis for that.
    """

    implementation: Implementation | None = None
    mesh: Mesh | None = None
    rules: Rules = RULES
    experts: Hashable | None = None
    context: Way | None = None
    scatter_norms: bool = False
    pipeline: Pipeline = ONE_CHUNK

    @property
    def runs_xla(self) -> bool:
        """Whether no kernels run."""
        asked = self.implementation
        return asked == "xla" or (asked is None and backend_of_this_device()[0] == "xla")

    @property
    def on_one_device(self) -> "Execution":
        """The same on the device that runs it, as within `per_device`."""
        return dataclasses.replace(self, mesh=None)

    @property
    def cache_multiple(self) -> int:
        """The capacity of a cache should be a multiple of so many tokens: its slots divide, and kernels take them."""
        return (1 if self.runs_xla else TILE_TOKENS) * self.num_parts("S")

    def mesh_axes(self, letter: str, count: int | None = None) -> tuple[str, ...]:
        """The mesh axes over which an axis is split that has `count` things to split (None: any number)."""
        return () if self.mesh is None else self.rules.mesh_axes(self.mesh, letter, count)

    def num_parts(self, letter: str, count: int | None = None) -> int:
        """Over how many devices an axis is split that has `count` things to split (None: any number)."""
        return 1 if self.mesh is None else num_devices(self.mesh, self.mesh_axes(letter, count))

    def padded(self, weight: Weight) -> Weight:
        """A weight as the devices hold it: zeros fill up some axes that would not divide (`sharding/rules.py`)."""
        return weight if self.mesh is None else self.rules.padded(self.mesh, weight)

    def part_shape(self, shape: tuple[int, ...], axes: str) -> tuple[int, ...]:
        """What `per_device` gives each device of an array of this shape."""
        names = ("_" if letter in _TOKENS else letter for letter in axes.split())
        return tuple(size // self.num_parts(name, size) for name, size in zip(names, shape, strict=True))

    def per_device(
        self,
        function: Callable[..., Any],
        in_axes: tuple[str | None, ...],
        out_axes: tuple[str, ...],
        *,
        split: str = "",
    ) -> Callable[..., Any]:
        """`function` run by every device on its part of the arguments, given their axes ("B K S H").

        None: a tree, its arrays split as its classes declare (`sharding/layout.py`), and whole where they say nothing.
        Tokens (T) and slots (S) are whole, but for those that `split` names.

        The compiler cannot split a kernel by itself, as it does the operations around it.
        """
        if self.mesh is None:
            return function
        mesh, whole = self.mesh, set(_TOKENS) - set(split)
        rules = Rules(tuple((letter, axis) for letter, axis in self.rules.pairs if letter not in whole))

        def run(*arguments: Any) -> Any:
            counts: dict[str, int] = {}
            for axes, argument in zip(in_axes, arguments, strict=True):
                counts |= {} if axes is None else dict(zip(axes.split(), argument.shape, strict=True))

            def spec(axes: str) -> PartitionSpec:
                letters = axes.split()
                return rules.spec(mesh, letters, [counts.get(letter) for letter in letters])

            def specs(axes: str | None, argument: Any) -> Any:
                if axes is not None:
                    return spec(axes)
                return jax.tree.map(lambda sharding: sharding.spec, layout.shardings(argument, mesh, rules))

            in_specs = tuple(map(specs, in_axes, arguments))
            return on_each_device(function, mesh, in_specs, tuple(map(spec, out_axes)))(*arguments)

        return run

    def shardings(self, tree: Any) -> Any:
        """Where the arrays of a state lie, by the axes that its classes declare (`sharding/layout.py`)."""
        assert self.mesh is not None, "a single device needs no shardings"
        return layout.shardings(tree, self.mesh, self.rules)

    def laid_out(self, tree: Any) -> Any:
        """A state inside a jitted function, told to lie where `shardings` says; unchanged on a single device."""
        return tree if self.mesh is None else jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def split(self, array: Array, axes: str) -> Array:
        """An array inside a jitted function, told to be split by its axes ("B T D"); unchanged on a single device."""
        if self.mesh is None:
            return array
        spec = self.rules.spec(self.mesh, axes.split(), array.shape)
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh_here(self.mesh), spec))

    def by_tokens(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Hidden states between blocks, inside a jitted function: split by tokens if they are a chunk of a prompt."""
        is_split = hidden.shape[1] > STEP_TOKENS and self.num_parts("T") > 1 and not self.scatter_norms
        return self.split(hidden, "B T D") if is_split else hidden

    def all_tokens(self, array: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        """What a recurrence goes through, inside a jitted function: every device has all tokens of what it has.

        A state is handed from token to token, and the compiler would send it from device to device in a loop.
        """
        if self.mesh is None or self.num_parts("T") == 1:
            return array
        any_way = PartitionSpec.UNCONSTRAINED
        spec = PartitionSpec(any_way, None, *[any_way] * (array.ndim - 2))
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh_here(self.mesh), spec))

    def scattered(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Hidden states between the parts of a block, inside a jitted function; unchanged without `scatter_norms`."""
        if self.mesh is None or not self.scatter_norms:
            return hidden
        whole = self.split(hidden, "B T D")
        place = NamedSharding(mesh_here(self.mesh), scatter_of(self, hidden.shape[0], hidden.shape[1]).spec)
        return jax.lax.with_sharding_constraint(whole, place)

    def whole(self, normed: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What a part of a block reads of what was `scattered`."""
        return self.split(normed, "B T D") if self.scatter_norms else normed

    def joined(self, tree: Any) -> Any:
        """The tree with every array on the mesh, whole on each device unless it is there already.

        A jitted function takes arrays of one set of devices. Unchanged on a single device.
        """
        if self.mesh is None:
            return tree
        everywhere, devices = NamedSharding(automatic(self.mesh), PartitionSpec()), set(self.mesh.devices.flat)

        def place(leaf: Any) -> jax.Array:
            if isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices:
                return leaf
            if everywhere.is_fully_addressable:
                return jax.device_put(leaf, everywhere)
            # Every process has the whole; `device_put` would send it around to see that they agree.
            host = np.asarray(leaf)
            return jax.make_array_from_callback(host.shape, everywhere, lambda index: host[index])

        return jax.tree.map(place, tree)


class Scatter(NamedTuple):
    """How hidden states are scattered: over which axis of [B, T, D] (None: they are not), and the whole of the spec."""

    axis: int | None
    spec: PartitionSpec


def scatter_of(execution: Execution, batch: int, num_tokens: int) -> Scatter:
    """Rows are split over the devices that split heads if they divide, else the tokens of a row, else neither."""
    heads, split = execution.mesh_axes("N"), [execution.mesh_axes("B", batch), execution.mesh_axes("T", num_tokens)]
    assert execution.mesh is not None
    for axis, size in enumerate((batch, num_tokens)):
        if size % num_devices(execution.mesh, (*split[axis], *heads)) == 0:
            split[axis] = (*split[axis], *heads)
            return Scatter(axis, PartitionSpec(split[0] or None, split[1] or None))
    return Scatter(None, PartitionSpec(split[0] or None, split[1] or None))


ON_THIS_DEVICE = Execution()
