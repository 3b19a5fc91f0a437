"""Plans pipeline parallelism: which layers each stage runs, and which micro-batch it works on at each tick.

Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM, arXiv 2104.04473: the layers are split
over P stages, each on its own devices, in v chunks per stage (interleaving), and the rows are split into m
micro-batches that follow each other through the stages. The bubble is (P - 1) / (m v) of the time that a stage works.

Departs from the paper, which trains: only forwards are run. All stages run one program, so layers at the same place of
every chunk must be alike. Other layers may come before the stages and after them; all devices run those.

`models/pipelined.py` runs it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from decodax.core.arguments import in_order, is_integer, refusal, whole_number

# Up to this many tokens a bfloat16 product takes no longer than reading its weight: 240 on a TPU v5e (197 TFLOP/s over
# 819 GB/s, Google Cloud TPU documentation), 295 on an H100 SXM (989 over 3.35 TB/s, NVIDIA's data sheet).
BALANCED_TOKENS = 256


@dataclass(frozen=True)
class Pipeline:
    """How a model runs in stages, where its mesh has a pipeline axis; does not change the result.

    chunks: v, chunks of layers on each device. More chunks shrink the bubble, and add permutes.
    micro_batches: m, into which the rows of a forward are split; None for `best_micro_batches`.
    outside: how many of the first and of the last layers all devices run; None for the first few that differ in kind
        from all others, as DeepSeek's first layers do.
    """

    chunks: int = 1
    micro_batches: int | None = None
    outside: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunks", whole_number("chunks", self.chunks, least=1))
        if self.micro_batches is not None:
            object.__setattr__(self, "micro_batches", whole_number("micro_batches", self.micro_batches, least=1))
        if self.outside is not None:
            layers = in_order(self.outside)
            if layers is None or len(layers) != 2 or any(not is_integer(count) or count < 0 for count in layers):
                raise refusal("outside", "two numbers of layers, first and last", self.outside)
            object.__setattr__(self, "outside", tuple(layers))


ONE_CHUNK = Pipeline()


@dataclass(frozen=True)
class Stages:
    """Which layers each stage runs. A device's layers, caches and parameters are lists of places.

    Places: `before` layers that all devices run, then `chunk_layers` stacks, then `after` layers that all run. A stack
    holds the num_stages * chunks layers at the same place of their chunks, stage by stage: entry s * chunks + r of
    stack i is layer before + (r * num_stages + s) * chunk_layers + i of the model.

    num_stages: P.
    chunks: v, on each stage.
    chunk_layers: layers of a chunk.
    before: layers before the stages.
    after: layers after the stages.
    """

    num_stages: int
    chunks: int
    chunk_layers: int
    before: int = 0
    after: int = 0

    @property
    def stacks(self) -> range:
        """The places that hold different layers on each stage."""
        return range(self.before, self.before + self.chunk_layers)

    @property
    def stack_size(self) -> int:
        return self.num_stages * self.chunks

    @property
    def num_places(self) -> int:
        return self.stacks.stop + self.after

    def layers(self, place: int) -> tuple[int, ...]:
        """The layers of the model at a place, in the order of the stack; a single one outside the stages.

        >>> [Stages(num_stages=2, chunks=2, chunk_layers=1, before=1).layers(place) for place in range(2)]
        [(0,), (1, 3, 2, 4)]
        """
        if place < self.before:
            return (place,)
        if place >= self.stacks.stop:
            return (place + (self.stack_size - 1) * self.chunk_layers,)
        first = [
            (chunk * self.num_stages + stage) * self.chunk_layers
            for stage in range(self.num_stages)
            for chunk in range(self.chunks)
        ]
        return tuple(place + start for start in first)


def find_stages(blocks: Sequence[Any], num_stages: int, pipeline: Pipeline) -> Stages:
    """The stages of a model, given a description of each layer; layers with equal descriptions are alike.

    Raises ValueError, with the layers that do not fit and a pipeline that would, if the layers do not divide, or
    differ.
    """
    before, after = pipeline.outside or (_differing_first(blocks, num_stages), 0)
    problem = _problem(blocks, num_stages, pipeline.chunks, before, after)
    if problem is not None:
        raise ValueError(f"{problem}; {_advice(blocks, num_stages, pipeline.chunks)}")
    chunk_layers = (len(blocks) - before - after) // (num_stages * pipeline.chunks)
    return Stages(num_stages, pipeline.chunks, chunk_layers, before, after)


def _differing_first(blocks: Sequence[Any], num_stages: int) -> int:
    """How many of the first layers are of kinds that no later layer has, if at most one stage's share; else 0."""
    for count in range(1, len(blocks) // num_stages + 1):
        if not any(block in blocks[count:] for block in blocks[:count]):
            return count
    return 0


def _problem(blocks: Sequence[Any], num_stages: int, chunks: int, before: int, after: int) -> str | None:
    """Why these layers do not form such stages; None if they do.

    blocks: descriptions of all layers.
    num_stages: P.
    chunks: v.
    before, after: layers outside the stages.
    """
    inside, num_chunks = len(blocks) - before - after, num_stages * chunks
    outside = f" (of {len(blocks)}, {before} before and {after} after the stages)" if before or after else ""
    if inside < num_chunks or inside % num_chunks:
        return f"{inside} layers{outside} do not divide into {num_stages} pipeline stages of {chunks} chunk(s) each"
    chunk_layers = inside // num_chunks
    for layer in range(before, before + inside - chunk_layers):
        one, other = blocks[layer], blocks[layer + chunk_layers]
        if one != other:
            return (
                f"layers {layer} and {layer + chunk_layers} would be at the same place of two pipeline stages, and "
                f"differ in {_difference(one, other)}: stages run one program"
            )
    return None


def _difference(one: Any, other: Any, path: str = "") -> str:
    """The first field in which two descriptions differ."""
    if type(one) is not type(other) or not is_dataclass(one):
        return f"{path or 'kind'} ({_short(one)} and {_short(other)})"
    for field in fields(one):
        values = getattr(one, field.name), getattr(other, field.name)
        if values[0] != values[1]:
            return _difference(*values, f"{path}.{field.name}".lstrip("."))
    return path or "kind"


def _short(value: Any) -> str:
    text = type(value).__name__ if is_dataclass(value) else repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def _advice(blocks: Sequence[Any], num_stages: int, chunks: int) -> str:
    """A pipeline that would work: fewest layers outside the stages, with `chunks` chunks or with one."""
    for tried in dict.fromkeys((chunks, 1)):
        for outside in range(len(blocks) - num_stages * tried + 1):
            for after in range(outside + 1):
                if _problem(blocks, num_stages, tried, outside - after, after) is None:
                    options = f"chunks={tried}, outside={(outside - after, after)}"
                    return (
                        f"Pipeline({options}) would do, with the {outside} layer(s) outside the stages on all devices"
                    )
    return "use another size of the mesh axis that splits the layers, or split the model by tensor= instead"


@dataclass(frozen=True)
class Schedule:
    """Which micro-batch a stage works on: stage s runs chunk r of micro-batch i at tick i + r max(m, P) + s.

    With m >= P, as in the paper, a stage that has begun works without a pause; with fewer micro-batches it waits for
    the first one to return.

    num_stages: P.
    chunks: v.
    micro_batches: m.
    """

    num_stages: int
    chunks: int
    micro_batches: int

    @property
    def period(self) -> int:
        """Ticks from one chunk of a micro-batch to its next."""
        return max(self.micro_batches, self.num_stages)

    @property
    def num_ticks(self) -> int:
        return (self.chunks - 1) * self.period + self.micro_batches + self.num_stages - 1

    @property
    def bubble(self) -> float:
        """The time that a stage waits, divided by the time it works: (P - 1) / (m v) where m >= P.

        >>> Schedule(num_stages=4, chunks=2, micro_batches=8).bubble == 3 / 16
        True
        """
        work = self.micro_batches * self.chunks
        return (self.num_ticks - work) / work

    def work(self, tick: Any, stage: Any) -> tuple[Any, Any, Any]:
        """Chunk and micro-batch of a stage at a tick, and whether it has work; for plain and traced numbers."""
        since = tick - stage
        chunk, index = since // self.period, since % self.period
        return chunk, index, (since >= 0) & (chunk < self.chunks) & (index < self.micro_batches)


def best_micro_batches(num_rows: int, num_tokens: int, num_stages: int, chunks: int) -> int:
    """Into how many micro-batches to split a forward: a divisor of the rows.

    A stage reads its weights again for every micro-batch, so more of them cost time where reading weights dominates. A
    tick reads a chunk's weights and computes with n tokens, which takes n / BALANCED_TOKENS of the reading; the number
    of ticks times this sum is smallest near m^2 = (P - 1) / v tokens / BALANCED_TOKENS. So a decoding step of few
    tokens is not split, and a chunk of a prefill is.

    num_rows: of the forward.
    num_tokens: of all rows together.
    num_stages: P.
    chunks: v.

    >>> [best_micro_batches(16, tokens, num_stages=4, chunks=1) for tokens in (16, 1024, 16 * 512)]
    [1, 4, 8]
    """
    divisors = [m for m in range(1, num_rows + 1) if num_rows % m == 0]

    def cost(m: int) -> float:
        return Schedule(num_stages, chunks, m).num_ticks * (1 + num_tokens / (BALANCED_TOKENS * m))

    return min(divisors, key=cost)
