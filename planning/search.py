"""Searches the mesh for a model on a topology: every division of the chips that the model allows, by modelled cost.

Degrees of the axes data, pipeline, context, expert and tensor multiply to the number of chips. The rules are `RULES`,
which fit every mesh, so the result is a mesh for `decodax.load(mesh=...)`.

Galvatron: Efficient Transformer Training over Multiple GPUs Using Automatic Parallelism, arXiv 2211.13878, searches a
mesh for every layer. Its dynamic programme is in `layerwise.py`; here all layers share one mesh, as `load` needs it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from decodax.decoding.chunked_prefill import MAX_CHUNK_TOKENS
from decodax.layers.moe.layer import MoEConfig
from decodax.models.config import ModelConfig
from decodax.models.mesh_fitting import unsupported_reason
from decodax.planning.cost import Cost, cost
from decodax.planning.memory import Memory, Workload, memory_of
from decodax.planning.parts import forward_parts
from decodax.planning.split import Split
from decodax.planning.topology import Topology
from decodax.sharding.mesh import read_mesh_shape
from decodax.sharding.pipeline import ONE_CHUNK, Schedule, best_micro_batches, find_stages
from decodax.sharding.rules import MESH_AXES

Objective = Literal["time-to-first-token", "time-per-token", "throughput", "fit"]
OBJECTIVES: tuple[Objective, ...] = ("time-per-token", "time-to-first-token", "throughput", "fit")
LISTED = 8  # meshes in an error
_SAMPLES = 5  # chunks of a long prefill that are computed; a chunk's time grows linearly with the tokens before it


@dataclass(frozen=True)
class Plan:
    """A mesh with its modelled memory and time.

    topology: the chips.
    split: the model on the mesh.
    workload: what runs.
    memory: of a chip.
    token: a decoding step at full context; with a pipeline, all its stages for one micro-batch.
    chunk: the last prefill chunk.
    prompt_seconds: of the prefill of `context` tokens in all rows.
    token_turns: the time of all micro-batches, divided by that of `token` (`sharding/pipeline.py`).
    """

    topology: Topology
    split: Split
    workload: Workload
    memory: Memory
    token: Cost
    chunk: Cost
    prompt_seconds: float
    token_turns: float

    @property
    def seconds_per_token(self) -> float:
        """The time between two tokens of a row."""
        return self.token.total * self.token_turns

    @property
    def seconds_to_first_token(self) -> float:
        return self.prompt_seconds + self.seconds_per_token

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all rows together."""
        return self.workload.batch / self.seconds_per_token

    def score(self, objective: Objective) -> tuple[float, float]:
        """Smaller is better; free memory breaks ties."""
        values = {
            "time-per-token": self.seconds_per_token,
            "time-to-first-token": self.seconds_to_first_token,
            "throughput": -self.tokens_per_second,
            "fit": 0.0,
        }
        return values[objective], -float(self.memory.free)


class DoesNotFitError(ValueError):
    """No mesh leaves room for the model."""


@dataclass(frozen=True)
class LeftOut:
    """A mesh without a plan.

    mesh: as text.
    reason: why.
    """

    mesh: str
    reason: str


@dataclass(frozen=True)
class Search:
    """The result of `search`.

    plans: those that fit, the best first.
    left_out: all other meshes with the same number of chips.
    """

    plans: tuple[Plan, ...]
    left_out: tuple[LeftOut, ...]


def best_plans(
    config: ModelConfig,
    topology: Topology,
    workload: Workload,
    objective: Objective = "time-per-token",
    *,
    mesh: str | None = None,
) -> list[Plan]:
    """Every plan that fits, the best first; arguments and errors are those of `search`."""
    return list(search(config, topology, workload, objective, mesh=mesh).plans)


def search(
    config: ModelConfig,
    topology: Topology,
    workload: Workload,
    objective: Objective = "time-per-token",
    *,
    mesh: str | None = None,
) -> Search:
    """Plans every mesh.

    config: of the model.
    topology: the chips.
    workload: what runs.
    objective: what the plans are sorted by.
    mesh: plan only this one.
    Raises ValueError for a context beyond the model's, for a mesh of another size, or one that the model or the batch
    does not divide over, with meshes that would do.
    Raises `DoesNotFitError`, with the missing bytes and the smallest topology that would do, where nothing fits.
    """
    context = config.max_position_embeddings
    if workload.context > context:
        raise ValueError(f"context must be at most the model's {context:,} tokens, got {workload.context:,}")
    candidates = list(_meshes(topology.num_chips)) if mesh is None else [_requested(mesh, topology, workload)]
    plans, left_out = [], []
    for sizes in candidates:
        reason = why_left_out(config, sizes, workload.batch)
        if reason is None:
            plans.append(plan_for(config, topology, workload, sizes))
        else:
            left_out.append(LeftOut(Split.of(config, sizes).text, reason))
    if not plans:
        raise ValueError(_no_mesh(config, topology, workload, mesh, left_out[0]))
    fitting = [plan for plan in plans if plan.memory.free >= 0]
    if not fitting:
        raise DoesNotFitError(_what_is_missing(config, topology, workload, plans))
    left_out += [LeftOut(plan.split.text, _too_few(plan)) for plan in plans if plan.memory.free < 0]
    return Search(tuple(sorted(fitting, key=lambda plan: plan.score(objective))), tuple(left_out))


def _requested(mesh: str, topology: Topology, workload: Workload) -> dict[str, int]:
    sizes = read_mesh_shape(mesh)
    if math.prod(sizes.values()) != topology.num_chips:
        raise ValueError(
            f"the mesh {mesh!r} needs {math.prod(sizes.values())} chips, and {topology.name} has {topology.num_chips}"
        )
    rows = sizes.get("data", 1)
    if workload.batch % rows:
        raise ValueError(
            f"a batch of {workload.batch} does not divide over data={rows}: use a multiple of {rows} rows, or another "
            "mesh"
        )
    return sizes


def _no_mesh(config: ModelConfig, topology: Topology, workload: Workload, mesh: str | None, first: LeftOut) -> str:
    if mesh is None:
        return (
            f"{topology.name} has {topology.num_chips} chips, and no mesh of them divides this model: with "
            f"{first.mesh}, {first.reason}"
        )
    others = [Split.of(config, sizes).text for sizes in degrees(config, topology.num_chips, workload.batch)]
    if not others:
        return f"{topology.name}: no mesh of its {topology.num_chips} chips divides this model. {first.reason}"
    more = f" and {len(others) - LISTED} more" if len(others) > LISTED else ""
    return (
        f"the mesh {mesh!r} does not divide this model: {first.reason}; meshes of {topology.num_chips} chips that "
        f"would do: {'; '.join(others[:LISTED])}{more}"
    )


def degrees(config: ModelConfig, num_chips: int, batch: int) -> Iterator[dict[str, int]]:
    """Sizes of the mesh axes for `num_chips` chips that `why_left_out` allows."""
    for sizes in _meshes(num_chips):
        if why_left_out(config, sizes, batch) is None:
            yield sizes


def why_left_out(config: ModelConfig, sizes: Mapping[str, int], batch: int) -> str | None:
    """Why a mesh gets no plan; None where rows divide over data, layers form stages, and all weights divide."""
    rows, stages = sizes.get("data", 1), sizes.get("pipeline", 1)
    if batch % rows:
        return f"a batch of {batch} does not divide over data={rows}"
    if sizes.get("expert", 1) > 1 and not any(
        isinstance(block.feed_forward_layer, MoEConfig) for block in config.blocks
    ):
        return "the model has no experts: the axis expert would do what data does"
    try:
        if stages > 1:
            find_stages(config.blocks, stages, ONE_CHUNK)
    except ValueError as error:
        return str(error)
    return unsupported_reason(config, sizes)


def _meshes(num_chips: int) -> Iterator[dict[str, int]]:
    """Every division of the chips over the axes."""
    for sizes in _factors(num_chips, len(MESH_AXES)):
        yield dict(zip(MESH_AXES, sizes, strict=True))


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of `count` factors, in order."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factors(number // first, count - 1):
                yield first, *rest


def plan_for(config: ModelConfig, topology: Topology, workload: Workload, sizes: dict[str, int]) -> Plan:
    """The plan with this mesh, whether it fits or not.

    config: of the model.
    topology: the chips.
    workload: what runs.
    sizes: of the mesh axes.
    Raises ValueError for what does not divide.
    """
    split = Split.of(config, sizes)
    rings = topology.rings(dict(split.sizes))

    def forward(new: int, cached: int, *, with_logits: bool) -> Cost:
        tokens = workload.tokens(new, cached, workload.batch // micro_batches(split, workload, new))
        return cost(forward_parts(split, tokens, with_logits=with_logits), topology.chip, rings)

    def turns(new: int) -> float:
        """The time of all micro-batches, divided by that of one through all stages: includes filling and draining."""
        stages = split.degree("pipeline")
        return Schedule(stages, 1, micro_batches(split, workload, new)).num_ticks / stages

    token = forward(1, workload.context - 1, with_logits=True)
    chunk = min(MAX_CHUNK_TOKENS, workload.context)
    num_chunks = math.ceil(workload.context / chunk)
    sampled = sorted({round(i * (num_chunks - 1) / (_SAMPLES - 1)) for i in range(_SAMPLES)})
    chunks = [forward(chunk, index * chunk, with_logits=False) for index in sampled]
    mean = _mean_over(sampled, [one.total for one in chunks], num_chunks)
    memory, prompt_seconds = memory_of(split, topology, workload), mean * num_chunks * turns(chunk)
    return Plan(topology, split, workload, memory, token, chunks[-1], prompt_seconds, turns(1))


def micro_batches(split: Split, workload: Workload, num_new: int) -> int:
    """The number of micro-batches of a forward over `num_new` tokens of every row, as in decoding."""
    rows = workload.batch // split.num_shards("B", workload.batch)
    stages = split.degree("pipeline")
    return 1 if stages == 1 else best_micro_batches(rows, workload.batch * num_new, stages, 1)


def _mean_over(places: list[int], values: list[float], count: int) -> float:
    """The mean over 0 .. count - 1 of the linear interpolation between these places."""
    if len(places) == 1:
        return values[0]
    total = values[-1]
    for i in range(len(places) - 1):
        length = places[i + 1] - places[i]
        slope = (values[i + 1] - values[i]) / length
        total += sum(values[i] + slope * step for step in range(length))
    return total / count


def _what_is_missing(config: ModelConfig, topology: Topology, workload: Workload, plans: list[Plan]) -> str:
    nearest = max(plans, key=lambda plan: plan.memory.free)
    memory = nearest.memory
    problem = (
        f"this does not fit on {topology.name}: with {nearest.split.text} a chip needs {_gib(memory.total)} "
        f"({_gib(memory.weights)} of weights, {_gib(memory.cache)} of cache, {_gib(memory.temporaries)} beside) and "
        f"has {_gib(memory.usable)}: {_gib(-memory.free)} too few"
    )
    larger = smallest_that_fits(config, topology, workload)
    if larger is not None:
        return f"{problem}. The smallest that would do is {larger.name}"
    return f"{problem}, and no larger slice of {topology.chip.title} would do: use a smaller batch or context"


def smallest_that_fits(config: ModelConfig, topology: Topology, workload: Workload) -> Topology | None:
    """The smallest slice of the same chip on which some mesh fits."""
    for larger in topology.larger:
        for sizes in degrees(config, larger.num_chips, workload.batch):
            if memory_of(Split.of(config, sizes), larger, workload).free >= 0:
                return larger
    return None


def _too_few(plan: Plan) -> str:
    return f"does not fit: a chip has {_gib(-plan.memory.free)} too few"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
