"""Computes a forward's time from a roofline: data-sheet rates, and which operations overlap.

Two limits bound a forward. The memory has to deliver all bytes; and its cost items depend on each other, so their
arithmetic and their collectives run one after the other. XLA for TPU prefetches weights into VMEM while devices wait
for each other (the compiled programs have many such copies), so there a forward takes the longer of

    stream   all bytes, at the memory's bandwidth
    chain    collectives, and per item the longer of its arithmetic and of the bytes that cannot be prefetched:
             caches, and the weights of experts, which are known only after the router

On other chips each item waits for its own bytes, and everything is added up. Rates are the peaks, although programs do
not reach them, and starting an operation takes no time: data sheets give numbers for neither.
`tests/planning/test_published_speeds.py` compares the results with published speeds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from decodax.planning.chips import Chip
from decodax.planning.network import Kind, Ring
from decodax.planning.work import CostItem

LIMITS = {
    "arithmetic": "arithmetic",
    "weights": "reading weights",
    "cache": "reading the cache",
    "activations": "moving activations",
    "network": "collectives between chips",
}


@dataclass(frozen=True)
class CollectiveCost:
    """Collectives of one kind over the same mesh axes.

    kind: of collective.
    axes: of the mesh.
    count: how many.
    num_bytes: of all together.
    seconds: of all together.
    """

    kind: Kind
    axes: tuple[str, ...]
    count: int
    num_bytes: float
    seconds: float


@dataclass(frozen=True)
class Cost:
    """The cost of one forward on each chip.

    seconds: its time by LIMITS; they add up to `total`.
    hidden: seconds by LIMITS that overlap with those.
    flops: of all items.
    moved_bytes: between memory and arithmetic.
    collectives: of all items.
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
        """What takes most of the time, in words."""
        return LIMITS[self.bound]

    @property
    def bound(self) -> str:
        """The same, as a key of LIMITS."""
        return max(self.seconds, key=self.seconds.__getitem__)


def cost(items: Iterable[CostItem], chip: Chip, rings: Mapping[str, tuple[Ring, ...]]) -> Cost:
    """The cost of a forward with these items.

    rings: the rings of the network that each mesh axis uses (`Topology.rings`).
    """
    stream, chain, both = (dict.fromkeys(LIMITS, 0.0) for _ in range(3))
    collectives: dict[tuple[Kind, tuple[str, ...]], list[float]] = {}
    flops = moved = 0.0
    for item in items:
        arithmetic = {"arithmetic": item.count * item.flops / chip.bf16_flops}
        bytes_of = {"weights": item.weight_bytes, "cache": item.cache_bytes, "activations": item.activation_bytes}
        memory = {name: item.count * size / chip.memory_bandwidth for name, size in bytes_of.items()}
        late = {name: memory[name] for name in (("cache",) if item.fetched_ahead else ("cache", "weights"))}
        network = sum(_seconds(item, chip, rings, collectives))
        for where, steps in (
            (stream, memory),
            (chain, max(arithmetic, late, key=_total)),
            (both, max(arithmetic, memory, key=_total)),
        ):
            for name, value in steps.items():
                where[name] += value
        chain["network"] += network
        both["network"] += network
        flops += item.count * item.flops
        moved += item.count * sum(bytes_of.values())
    seconds, hidden = both, {}
    if chip.fetches_ahead:
        seconds, hidden = (stream, chain) if _total(stream) >= _total(chain) else (chain, stream)
        hidden = {name: value for name, value in hidden.items() if value > seconds[name]}
    listed = (CollectiveCost(*key, int(count), size, total) for key, (count, size, total) in collectives.items())
    return Cost(seconds, hidden, flops, moved, tuple(listed))


def _total(seconds: Mapping[str, float]) -> float:
    return sum(seconds.values())


def _seconds(item: CostItem, chip: Chip, rings: Mapping[str, tuple[Ring, ...]], collectives: dict) -> Iterable[float]:
    """The seconds of each of an item's collectives.

    item: of the forward.
    chip: whose network is used.
    rings: as in `cost`.
    collectives: totals by kind and mesh axes, to which this adds.
    """
    for one in item.collectives:
        used_rings = tuple(ring for axis in one.axes for ring in rings.get(axis, ()))
        seconds = chip.network.seconds(one.kind, one.num_bytes, used_rings)
        total = collectives.setdefault((one.kind, one.axes), [0, 0.0, 0.0])
        for index, value in enumerate((1, one.num_bytes, seconds)):
            total[index] += item.count * value
        yield item.count * seconds
