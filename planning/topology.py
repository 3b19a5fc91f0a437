"""Parses the name of a TPU slice or a machine of GPUs: `v5e:4x4`, `v5p:4x4x8`, `gpu:h200x8`.

The cost of a collective depends on which axes of a TPU's torus its mesh axis uses. As JAX places them, the last axis of
the mesh first: a mesh axis gets full axes of the torus where some multiply to its size, as many as possible; else the
longest, and consecutive chips of another one.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from decodax.planning.chips import GPUS, TPUS, Chip
from decodax.planning.network import Ring


@dataclass(frozen=True)
class Topology:
    """Chips of one kind in a grid.

    chip: their kind.
    shape: chips along each axis.
    """

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
        """The rings of the torus that each mesh axis uses, given the axes' sizes in the mesh's order."""
        left = list(self.shape)
        found: dict[str, tuple[Ring, ...]] = {}
        for name, size in reversed(tuple(sizes.items())):
            found[name] = tuple(
                self.chip.network.ring(length, is_full_axis) for length, is_full_axis in self._take(left, size)
            )
        return found

    def _take(self, left: list[int], size: int) -> list[tuple[int, bool]]:
        """Removes `size` chips from those `left` of each axis: (chips along an axis, whether they are all of it)."""
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
    """The topology of this name. Raises ValueError, with all known names, for one that does not exist."""
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
                expected = Topology(TPUS[kind], tuple(reversed(shape))).name
                raise ValueError(f"libtpu knows no topology {text!r}: the shorter sides come first, {expected}")
    raise ValueError(f"libtpu and the planner know no topology {text!r}; there are\n{_known()}")


def _known() -> str:
    """All names, a line for each chip."""
    lines = []
    for chip in (*TPUS.values(), *GPUS.values()):
        names = [Topology(chip, shape).name for shape in chip.slices]
        lines.append(f"  {', '.join(names)}")
    return "\n".join(lines)
