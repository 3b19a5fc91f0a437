"""How long a collective takes: over the links of a torus of TPUs, or through a switch.

Torus: a gather passes pieces around every axis at once, so it takes the longer of its hops' latency and the time that
its bytes need on the links of a chip ("How to Scale Your Model", jax-ml.github.io/scaling-book/sharding). An axis
without a link back from its last chip to its first is a line: more hops, and its ends receive through one link.
Switch: NCCL's own cost model, a launch, a latency for each step of a ring, and the bytes.

Sizes are bytes that one device holds: of a gather or a sum, the whole result; of an exchange, what it sends in all.
"""

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"]


@dataclass(frozen=True)
class Ring:
    """A stretch of chips along one axis of a torus; `wraps` says whether its last chip has a link to the first."""

    length: int
    wraps: bool

    @property
    def hops(self) -> int:
        """From a chip to the one that is farthest away."""
        return self.length // 2 if self.wraps else self.length - 1


@dataclass(frozen=True)
class Torus:
    """link_bandwidth: bytes per second, one way, of one link. wraps_at: axes of a multiple of this length are rings."""

    link_bandwidth: float
    hop_seconds: float
    wraps_at: int

    def ring(self, length: int, whole: bool) -> Ring:
        """Chips along one axis of a slice; `whole` if they are all of them."""
        return Ring(length, whole and length % self.wraps_at == 0)

    def seconds(self, kind: Kind, num_bytes: float, rings: tuple[Ring, ...]) -> float:
        """Of one collective among chips that fill `rings`, all axes used at once."""
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
        return 2 * gather if kind == "all-reduce" else gather  # a sum is scattered, then gathered


@dataclass(frozen=True)
class Switch:
    """bandwidth: bytes per second, one way, of one device into the switch."""

    bandwidth: float
    launch_seconds: float
    step_seconds: float

    def ring(self, length: int, whole: bool) -> Ring:
        """Any devices can form a ring."""
        return Ring(length, True)

    def seconds(self, kind: Kind, num_bytes: float, rings: tuple[Ring, ...]) -> float:
        """Of one collective among as many devices as `rings` hold."""
        count = math.prod(ring.length for ring in rings)
        if count == 1:
            return 0.0
        if kind == "collective-permute":
            return self.launch_seconds + self.step_seconds + num_bytes / self.bandwidth
        steps = 2 * (count - 1) if kind == "all-reduce" else count - 1
        sent = num_bytes * steps / count
        return self.launch_seconds + steps * self.step_seconds + sent / self.bandwidth
