"""How layers compute, apart from what they compute: which kernels run, and over which devices."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from decodax.kernels_pallas.choice import Implementation, backend_of_this_device
from decodax.sharding.rules import TENSOR, Rules, automatic, num_devices

TILE_TOKENS = 128  # slots of a cache that kernels read at a time


@dataclass(frozen=True)
class Execution:
    """implementation: of the kernels (`kernels_pallas/choice.py`); None takes those made for this process's device.

    mesh, rules: the devices that weights are split over, and how. A kernel runs on each device's part, so heads have to
    divide over them.

    experts: how the experts of a mixture run: a name of METHODS in `layers/moe/experts/`, one of its objects, or None
    for the one that suits the devices and the number of tokens.
    """

    implementation: Implementation | None = None
    mesh: Mesh | None = None
    rules: Rules = TENSOR
    experts: Hashable | None = None

    @property
    def cache_multiple(self) -> int:
        """The capacity of a cache should be a multiple of so many tokens, for the kernels that run to take it."""
        asked = self.implementation
        runs_xla = asked == "xla" or (asked is None and backend_of_this_device()[0] == "xla")
        return 1 if runs_xla else TILE_TOKENS

    def num_parts(self, letter: str) -> int:
        """Over how many devices an axis is split."""
        if self.mesh is None:
            return 1
        (axis,) = self.rules.spec(self.mesh, (letter,))
        return num_devices(self.mesh, axis)

    def per_device(
        self, function: Callable[..., Any], in_axes: tuple[str | None, ...], out_axes: tuple[str, ...]
    ) -> Callable[..., Any]:
        """`function` run by every device on its part of the arguments, given their axes ("B K S H"; None: no array).

        The compiler cannot split a kernel by itself, as it does the operations around it.
        """
        if self.mesh is None:
            return function
        mesh = self.mesh

        def spec(axes: str | None) -> PartitionSpec:
            return PartitionSpec() if axes is None else self.rules.spec(mesh, axes.split())

        in_specs, out_specs = tuple(map(spec, in_axes)), tuple(map(spec, out_axes))
        return jax.shard_map(function, mesh=automatic(mesh), in_specs=in_specs, out_specs=out_specs, check_vma=False)


ON_THIS_DEVICE = Execution()
