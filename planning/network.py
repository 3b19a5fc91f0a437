"""Computes how long a collective takes: over the links of a torus of TPUs, or through a switch.

Torus: an all-gather sends pieces around every axis at once, so it takes the longer of its hops' latency and the time
that its bytes need on the links of a chip ("How to Scale Your Model", jax-ml.github.io/scaling-book/sharding). An axis
without a link back from its last chip to its first is a line: more hops, and its ends receive through one link.
Switch: NCCL's own cost model, a launch, a latency for each step of a ring, and the bytes.

Sizes are bytes of one device: of an all-gather or all-reduce, the full result; of an all-to-all, all that it sends.
"""

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"]


@dataclass(frozen=True)
class Ring:
    """Consecutive chips along one axis of a torus.

    length: chips.
    wraps: whether the last chip has a link to the first.
    """

    length: int
    wraps: bool

    @property
    def hops(self) -> int:
        """Hops from a chip to the farthest one."""
        return self.length // 2 if self.wraps else self.length - 1


@dataclass(frozen=True)
class Torus:
    """The links of TPUs.

    link_bandwidth: bytes per second, one way, of one link.
    hop_seconds: latency of a hop.
    wraps_at: axes of a multiple of this length are rings.
    """

    link_bandwidth: float
    hop_seconds: float
    wraps_at: int

    def ring(self, length: int, is_full_axis: bool) -> Ring:
        """`length` chips along one axis of a slice; `is_full_axis` if the axis has no others."""
        return Ring(length, is_full_axis and length % self.wraps_at == 0)

    def seconds(self, kind: Kind, num_bytes: float, rings: tuple[Ring, ...]) -> float:
        """The seconds of one collective among the chips of `rings`, with all axes used at once."""
        rings = tuple(ring for ring in rings if ring.length > 1)
        if not rings:
            return 0.0
        if kind == "collective-permute":
            return self.hop_seconds + num_bytes / self.link_bandwidth
        hops = sum(ring.hops for ring in rings)
        if kind == "all-to-all":  # half of what a chip sends crosses the middle of each axis
            crossing = max(ring.length / (8 if ring.wraps else 4) for ring in rings) * num_bytes
            return max(hops * self.hop_seconds, crossing / self.link_bandwidth)
        num_links = sum(2 if ring.wraps else 1 for ring in rings)
        missing = 1 - 1 / math.prod(ring.length for ring in rings)
        gather = max(hops * self.hop_seconds, num_bytes * missing / (num_links * self.link_bandwidth))
        return 2 * gather if kind == "all-reduce" else gather  # a reduce-scatter, then an all-gather


@dataclass(frozen=True)
class Switch:
    """The switch of GPUs.

    bandwidth: bytes per second, one way, of one device into the switch.
    launch_seconds: to start a collective.
    step_seconds: latency of a step of a ring.
    """

    bandwidth: float
    launch_seconds: float
    step_seconds: float

    def ring(self, length: int, is_full_axis: bool) -> Ring:
        """Any devices can form a ring."""
        return Ring(length, True)

    def seconds(self, kind: Kind, num_bytes: float, rings: tuple[Ring, ...]) -> float:
        """The seconds of one collective among as many devices as `rings` hold."""
        count = math.prod(ring.length for ring in rings)
        if count == 1:
            return 0.0
        if kind == "collective-permute":
            return self.launch_seconds + self.step_seconds + num_bytes / self.bandwidth
        steps = 2 * (count - 1) if kind == "all-reduce" else count - 1
        sent = num_bytes * steps / count
        return self.launch_seconds + steps * self.step_seconds + sent / self.bandwidth
