"""How layers compute, apart from what they compute: which kernels run, and over which devices."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from decodax.kernels_pallas.choice import Implementation, backend_of_this_device
from decodax.sharding import layout
from decodax.sharding.rules import RULES, Rules, automatic, num_devices

TILE_TOKENS = 128  # slots of a cache that kernels read at a time
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
    """

    implementation: Implementation | None = None
    mesh: Mesh | None = None
    rules: Rules = RULES
    experts: Hashable | None = None
    scatter_norms: bool = False

    @property
    def cache_multiple(self) -> int:
        """The capacity of a cache should be a multiple of so many tokens, for the kernels that run to take it."""
        asked = self.implementation
        runs_xla = asked == "xla" or (asked is None and backend_of_this_device()[0] == "xla")
        return 1 if runs_xla else TILE_TOKENS

    def mesh_axes(self, letter: str, count: int | None = None) -> tuple[str, ...]:
        """The mesh axes over which an axis is split that has `count` things to split (None: any number)."""
        return () if self.mesh is None else self.rules.mesh_axes(self.mesh, letter, count)

    def num_parts(self, letter: str, count: int | None = None) -> int:
        """Over how many devices an axis is split that has `count` things to split (None: any number)."""
        return 1 if self.mesh is None else num_devices(self.mesh, self.mesh_axes(letter, count))

    def part_shape(self, shape: tuple[int, ...], axes: str) -> tuple[int, ...]:
        """What `per_device` gives each device of an array of this shape."""
        names = ("_" if letter in _TOKENS else letter for letter in axes.split())
        return tuple(size // self.num_parts(name, size) for name, size in zip(names, shape, strict=True))

    def per_device(
        self, function: Callable[..., Any], in_axes: tuple[str | None, ...], out_axes: tuple[str, ...]
    ) -> Callable[..., Any]:
        """`function` run by every device on its part of the arguments, given their axes ("B K S H"; None: all of it).

        The compiler cannot split a kernel by itself, as it does the operations around it. Tokens and slots are whole.
        """
        if self.mesh is None:
            return function
        mesh, rules = automatic(self.mesh), self.rules

        def run(*arguments: Any) -> Any:
            counts: dict[str, int] = {}
            for axes, argument in zip(in_axes, arguments, strict=True):
                counts |= {} if axes is None else dict(zip(axes.split(), argument.shape, strict=True))

            def spec(axes: str | None) -> PartitionSpec:
                letters = () if axes is None else axes.split()
                names = tuple("_" if letter in _TOKENS else letter for letter in letters)
                return rules.spec(mesh, names, [counts.get(letter) for letter in letters])

            in_specs, out_specs = tuple(map(spec, in_axes)), tuple(map(spec, out_axes))
            return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(
                *arguments
            )

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
        return jax.lax.with_sharding_constraint(array, NamedSharding(automatic(self.mesh), spec))

    def scattered(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Hidden states between the parts of a block, inside a jitted function; unchanged without `scatter_norms`."""
        if self.mesh is None or not self.scatter_norms:
            return hidden
        whole = self.split(hidden, "B T D")
        place = NamedSharding(automatic(self.mesh), scatter_of(self, hidden.shape[0], hidden.shape[1]).spec)
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
