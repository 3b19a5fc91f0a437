"""A forward's time from a roofline: data-sheet rates, and what overlaps with what.

Two things bound a forward. The memory has to deliver all bytes; and its parts depend on each other, so their arithmetic
and their collectives come one after the other. XLA for TPU fetches weights into VMEM ahead of time, while devices wait
for each other (the compiled programs are full of such copies), so there a forward takes the longer of

    stream   all bytes, at the memory's bandwidth
    chain    collectives, and per part the longer of its arithmetic and of the bytes that nobody can fetch before:
             caches, and the weights of experts, which are known when the router has spoken

On other chips each part waits for its own bytes, and everything is added up. Nothing is taken off for what programs do
not reach, and no time is counted for starting an operation: data sheets say nothing of either. How far published
speeds are from this stands in `tests/sharding/plan/test_published_speeds.py`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from decodax.sharding.plan.chips import Chip
from decodax.sharding.plan.network import Kind, Ring
from decodax.sharding.plan.work import Part

LIMITS = {
    "arithmetic": "arithmetic",
    "weights": "reading weights",
    "cache": "reading the cache",
    "activations": "moving activations",
    "network": "collectives between chips",
}


@dataclass(frozen=True)
class CollectiveCost:
    """`count` collectives of one kind over the same mesh axes: bytes in all, seconds in all."""

    kind: Kind
    axes: tuple[str, ...]
    count: int
    num_bytes: float
    seconds: float


@dataclass(frozen=True)
class Cost:
    """Of one forward on each chip. seconds: what its time is made of, by LIMITS; they add up to `total`.

    hidden: what goes on meanwhile and takes no time of its own.
    """

    seconds: dict[str, float]
    hidden: dict[str, float]
    flops: float
    moved_bytes: float
    collectives: tuple[CollectiveCost, ...]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def limit(self) -> str:
        """What takes the most of the time, in words."""
        return LIMITS[self.bound]

    @property
    def bound(self) -> str:
        """The same, as a key of LIMITS."""
        return max(self.seconds, key=self.seconds.__getitem__)


def cost(parts: Iterable[Part], chip: Chip, rings: Mapping[str, tuple[Ring, ...]]) -> Cost:
    """rings: the stretches of the network that each mesh axis runs over (`Topology.rings`)."""
    stream, chain, both = (dict.fromkeys(LIMITS, 0.0) for _ in range(3))
    collectives: dict[tuple[Kind, tuple[str, ...]], list[float]] = {}
    flops = moved = 0.0
    for part in parts:
        arithmetic = {"arithmetic": part.count * part.flops / chip.bf16_flops}
        bytes_of = {"weights": part.weight_bytes, "cache": part.cache_bytes, "activations": part.activation_bytes}
        memory = {name: part.count * size / chip.memory_bandwidth for name, size in bytes_of.items()}
        late = {name: memory[name] for name in (("cache",) if part.fetched_ahead else ("cache", "weights"))}
        network = sum(_seconds(part, chip, rings, collectives))
        for where, steps in (
            (stream, memory),
            (chain, max(arithmetic, late, key=_total)),
            (both, max(arithmetic, memory, key=_total)),
        ):
            for name, value in steps.items():
                where[name] += value
        chain["network"] += network
        both["network"] += network
        flops += part.count * part.flops
        moved += part.count * sum(bytes_of.values())
    seconds, hidden = both, {}
    if chip.fetches_ahead:
        seconds, hidden = (stream, chain) if _total(stream) >= _total(chain) else (chain, stream)
        hidden = {name: value for name, value in hidden.items() if value > seconds[name]}
    listed = (CollectiveCost(*key, int(count), size, took) for key, (count, size, took) in collectives.items())
    return Cost(seconds, hidden, flops, moved, tuple(listed))


def _total(seconds: Mapping[str, float]) -> float:
    return sum(seconds.values())


def _seconds(part: Part, chip: Chip, rings: Mapping[str, tuple[Ring, ...]], collectives: dict) -> Iterable[float]:
    """Of each of a part's collectives; adds them to the list of all."""
    for one in part.collectives:
        stretches = tuple(ring for axis in one.axes for ring in rings.get(axis, ()))
        took = chip.network.seconds(one.kind, one.num_bytes, stretches)
        total = collectives.setdefault((one.kind, one.axes), [0, 0.0, 0.0])
        for index, value in enumerate((1, one.num_bytes, took)):
            total[index] += part.count * value
        yield part.count * took
