"""A slice of TPUs or a machine of GPUs by its name: `v5e:4x4`, `v5p:4x4x8`, `gpu:h200x8`.

How the axes of a mesh lie on a TPU's torus decides what their collectives cost. As JAX places them, the last axis of
the mesh first: an axis takes whole axes of the torus where some multiply to its size, as many as it can; else the
longest, and a stretch of a further one.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from decodax.sharding.plan.chips import GPUS, TPUS, Chip
from decodax.sharding.plan.network import Ring


@dataclass(frozen=True)
class Topology:
    """Chips of one kind in a grid; `shape` counts them along each axis."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        sizes = "x".join(map(str, self.shape))
        return f"{self.chip.name}:{sizes}" if self.chip.is_tpu else f"gpu:{self.chip.name}x{sizes}"

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def larger(self) -> tuple["Topology", ...]:
        """The slices of this chip with more chips, the smallest first."""
        slices = sorted((shape for shape in self.chip.slices if math.prod(shape) > self.num_chips), key=math.prod)
        return tuple(Topology(self.chip, shape) for shape in slices)

    def rings(self, sizes: Mapping[str, int]) -> dict[str, tuple[Ring, ...]]:
        """The stretches of the torus that each axis of a mesh runs over, given the axes' sizes in the mesh's order."""
        left = list(self.shape)
        found: dict[str, tuple[Ring, ...]] = {}
        for name, size in reversed(tuple(sizes.items())):
            found[name] = tuple(self.chip.network.ring(length, whole) for length, whole in self._take(left, size))
        return found

    def _take(self, left: list[int], size: int) -> list[tuple[int, bool]]:
        """Takes `size` chips from what is `left` of each axis: (chips along an axis, whether they are all of it)."""
        axes = [index for index, length in enumerate(left) if length > 1]
        for count in range(len(axes), 0, -1):
            for chosen in itertools.combinations(axes, count):
                if math.prod(left[index] for index in chosen) == size:
                    taken = [(left[index], left[index] == self.shape[index]) for index in chosen]
                    for index in chosen:
                        left[index] = 1
                    return taken
        taken = []
        for index in sorted(axes, key=lambda index: -left[index]):
            length = math.gcd(left[index], size)
            if length > 1:
                taken.append((length, length == self.shape[index]))
                left[index] //= length
                size //= length
        return taken


def parse_topology(text: str) -> Topology:
    """The topology of this name. Raises ValueError for one that does not exist, with those that do."""
    kind, _, rest = text.partition(":")
    if kind == "gpu":
        name, _, count = rest.rpartition("x")
        if name in GPUS and count.isascii() and count.isdigit() and (int(count),) in GPUS[name].slices:
            return Topology(GPUS[name], (int(count),))
    elif kind in TPUS:
        sizes = rest.split("x")
        if all(size.isascii() and size.isdigit() for size in sizes):
            shape = tuple(map(int, sizes))
            if shape in TPUS[kind].slices:
                return Topology(TPUS[kind], shape)
            if tuple(reversed(shape)) in TPUS[kind].slices:
                wanted = Topology(TPUS[kind], tuple(reversed(shape))).name
                raise ValueError(f"libtpu knows no topology {text!r}: the shorter sides come first, {wanted}")
    raise ValueError(f"libtpu and the planner know no topology {text!r}; there are\n{_known()}")


def _known() -> str:
    """All names, a line for each chip."""
    lines = []
    for chip in (*TPUS.values(), *GPUS.values()):
        names = [Topology(chip, shape).name for shape in chip.slices]
        lines.append(f"  {', '.join(names)}")
    return "\n".join(lines)
