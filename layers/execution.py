"""Sets how layers execute: which kernels run, over which devices, and with which parallelism."""

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from decodax.core.weight import Weight
from decodax.kernels_pallas.decode.new_tokens import MAX_STEP_TOKENS
from decodax.kernels_pallas.selection import Implementation, backend_of_device
from decodax.sharding import constraints
from decodax.sharding.context_algorithm import ContextAlgorithm
from decodax.sharding.pipeline import ONE_CHUNK, Pipeline
from decodax.sharding.regions import mesh_here, on_each_device
from decodax.sharding.rules import RULES, Rules, automatic, num_devices

CACHE_TILE_TOKENS = 128  # slots of a cache that a kernel reads at a time
REPLICATED = "replicated"  # in place of axes, in `Execution.per_device`
_TOKENS = "TS"  # a kernel gets all tokens and slots of its rows and heads


@dataclass(frozen=True)
class Execution:
    """How layers execute.

    implementation: of the kernels (`kernels_pallas/selection.py`); None for those of this process's device.
    mesh: the devices that weights and states are split over. A kernel runs on each device's shard, so heads must
        divide over them.
    rules: sharding rules.
    experts: the expert dispatch algorithm: a name of METHODS in `layers/moe/dispatch/`, one of its objects, or None for
        the one that suits the devices and the number of tokens.
    context: the attention algorithm for a prompt whose tokens are split over devices, "ring" or "ulysses"; None for
        the one that sends less (`sharding/context_algorithm.py`).
    sequence_parallel: sequence parallelism: between mixer and feed-forward, tokens are also split over the devices that
        split heads. So the all-reduce after each becomes a reduce-scatter, norms and residual sums run on each
        device's shard, and an all-gather follows the norm (TokenWeave, arXiv 2505.11329, without its fused kernel).
    pipeline: how layers are split into stages, and rows into micro-batches, where the mesh has a pipeline axis.
    """

    implementation: Implementation | None = None
    mesh: Mesh | None = None
    rules: Rules = RULES
    experts: Hashable | None = None
    context: ContextAlgorithm | None = None
    sequence_parallel: bool = False
    pipeline: Pipeline = ONE_CHUNK

    @property
    def runs_xla(self) -> bool:
        """Whether plain XLA runs, without kernels."""
        asked = self.implementation
        return asked == "xla" or (asked is None and backend_of_device()[0] == "xla")

    @property
    def on_one_device(self) -> "Execution":
        """The same on a single device, as within `per_device`."""
        return dataclasses.replace(self, mesh=None)

    @property
    def cache_multiple(self) -> int:
        """Tokens of which a cache's capacity should be a multiple, so that slots divide and kernels support it."""
        return (1 if self.runs_xla else CACHE_TILE_TOKENS) * self.num_shards("S")

    def mesh_axes(self, axis_name: str, count: int | None = None) -> tuple[str, ...]:
        """The mesh axes over which a logical axis of `count` items is split (None: any number)."""
        return () if self.mesh is None else self.rules.mesh_axes(self.mesh, axis_name, count)

    def num_shards(self, axis_name: str, count: int | None = None) -> int:
        """The number of devices over which a logical axis of `count` items is split (None: any number)."""
        return 1 if self.mesh is None else num_devices(self.mesh, self.mesh_axes(axis_name, count))

    def padded(self, weight: Weight) -> Weight:
        """A weight as the devices hold it: some axes that do not divide are padded with zeros (`sharding/rules.py`)."""
        return weight if self.mesh is None else self.rules.padded(self.mesh, weight)

    def shard_shape(self, shape: tuple[int, ...], axes: str) -> tuple[int, ...]:
        """The shape of each device's shard in `per_device`, for an array of this shape."""
        names = ("_" if axis_name in _TOKENS else axis_name for axis_name in axes.split())
        return tuple(size // self.num_shards(name, size) for name, size in zip(names, shape, strict=True))

    def per_device(
        self,
        function: Callable[..., Any],
        in_axes: tuple[str | None, ...],
        out_axes: tuple[str, ...],
        *,
        split: str = "",
    ) -> Callable[..., Any]:
        """`function` run by every device on its shard of the arguments.

        The compiler cannot partition a kernel by itself, as it does the operations around it.

        function: of the shards.
        in_axes: the axes of each argument ("B K S H"); None for a tree whose arrays are split as its classes declare
            (`sharding/constraints.py`), REPLICATED for one that every device has as a whole.
        out_axes: the axes of each result.
        split: which of tokens (T) and slots (S) are split; the others are replicated.
        """
        if self.mesh is None:
            return function
        mesh, unsplit = self.mesh, set(_TOKENS) - set(split)
        rules = Rules(tuple((axis_name, axis) for axis_name, axis in self.rules.pairs if axis_name not in unsplit))

        def run(*arguments: Any) -> Any:
            counts: dict[str, int] = {}
            for axes, argument in zip(in_axes, arguments, strict=True):
                if axes not in (None, REPLICATED):
                    counts |= dict(zip(axes.split(), argument.shape, strict=True))

            def spec(axes: str) -> PartitionSpec:
                axis_names = axes.split()
                return rules.spec(mesh, axis_names, [counts.get(axis_name) for axis_name in axis_names])

            def specs(axes: str | None, argument: Any) -> Any:
                if axes == REPLICATED:
                    return jax.tree.map(lambda leaf: PartitionSpec(), argument)
                if axes is not None:
                    return spec(axes)
                return jax.tree.map(lambda sharding: sharding.spec, constraints.shardings(argument, mesh, rules))

            in_specs = tuple(map(specs, in_axes, arguments))
            return on_each_device(function, mesh, in_specs, tuple(map(spec, out_axes)))(*arguments)

        return run

    def shardings(self, tree: Any) -> Any:
        """The shardings of a state, by the axes that its classes declare (`sharding/constraints.py`)."""
        assert self.mesh is not None, "a single device needs no shardings"
        return constraints.shardings(tree, self.mesh, self.rules)

    def constrained(self, tree: Any) -> Any:
        """A state in a jitted function, with `shardings` as sharding constraint; unchanged on a single device."""
        return tree if self.mesh is None else jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def split(self, array: Array, axes: str) -> Array:
        """An array in a jitted function, with a sharding constraint by its axes ("B T D"); unchanged on one device."""
        if self.mesh is None:
            return array
        spec = self.rules.spec(self.mesh, axes.split(), array.shape)
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh_here(self.mesh), spec))

    def sharded_by_token(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Hidden states between blocks, in a jitted function: split by tokens if they are a prefill chunk."""
        is_split = hidden.shape[1] > MAX_STEP_TOKENS and self.num_shards("T") > 1 and not self.sequence_parallel
        return self.split(hidden, "B T D") if is_split else hidden

    def gathered_tokens(self, array: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        """The input of a recurrence, in a jitted function, with the token axis gathered.

        A state passes from token to token, and with split tokens the compiler would send it from device to device.
        """
        if self.mesh is None or self.num_shards("T") == 1:
            return array
        unconstrained = PartitionSpec.UNCONSTRAINED
        spec = PartitionSpec(unconstrained, None, *[unconstrained] * (array.ndim - 2))
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh_here(self.mesh), spec))

    def sequence_sharded(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Hidden states between mixer and feed-forward, in a jitted function; unchanged without `sequence_parallel`."""
        if self.mesh is None or not self.sequence_parallel:
            return hidden
        replicated = self.split(hidden, "B T D")
        sharding = NamedSharding(mesh_here(self.mesh), sequence_sharding(self, hidden.shape[0], hidden.shape[1]).spec)
        return jax.lax.with_sharding_constraint(replicated, sharding)

    def sequence_gathered(self, normed: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The all-gather of `sequence_sharded` states: the input of a mixer or feed-forward."""
        return self.split(normed, "B T D") if self.sequence_parallel else normed

    def replicated(self, tree: Any) -> Any:
        """The tree with every array replicated on the mesh; arrays already on the mesh keep their sharding.

        A jitted function needs all its arrays on one set of devices. Unchanged on a single device.
        """
        if self.mesh is None:
            return tree
        everywhere, devices = NamedSharding(automatic(self.mesh), PartitionSpec()), set(self.mesh.devices.flat)

        def place(leaf: Any) -> jax.Array:
            if isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices:
                return leaf
            if everywhere.is_fully_addressable:
                return jax.device_put(leaf, everywhere)
            # Every process has the full array; `device_put` would send it around to check that they agree.
            host = np.asarray(leaf)
            return jax.make_array_from_callback(host.shape, everywhere, lambda index: host[index])

        return jax.tree.map(place, tree)


class SequenceSharding(NamedTuple):
    """How sequence parallelism shards hidden states [B, T, D].

    axis: the axis that is split over the devices of the heads, None for none.
    spec: of the hidden states.
    """

    axis: int | None
    spec: PartitionSpec


def sequence_sharding(execution: Execution, batch: int, num_tokens: int) -> SequenceSharding:
    """Splits rows over the devices that split heads if they divide, else the tokens of a row, else neither."""
    heads, split = execution.mesh_axes("N"), [execution.mesh_axes("B", batch), execution.mesh_axes("T", num_tokens)]
    assert execution.mesh is not None
    for axis, size in enumerate((batch, num_tokens)):
        if size % num_devices(execution.mesh, (*split[axis], *heads)) == 0:
            split[axis] = (*split[axis], *heads)
            return SequenceSharding(axis, PartitionSpec(split[0] or None, split[1] or None))
    return SequenceSharding(None, PartitionSpec(split[0] or None, split[1] or None))


ON_THIS_DEVICE = Execution()
