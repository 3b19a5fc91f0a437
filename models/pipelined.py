"""Runs a model's layers in pipeline stages: each device holds some of the layers, and rows go from one to the next.

It all happens inside one forward, so whatever decodes with `Model.apply` decodes in stages: in every tick a stage takes
a micro-batch of rows, runs one chunk of its layers on it, and hands the hidden states to the stage behind it, the last
stage to the first (`sharding/pipeline.py` says when who does what). That is all that goes between stages, and the
result, once, to all of them. Caches stay where their layers are; a stage reads the micro-batch's part of its own.

Only the axis of stages is divided by hand; tensor, data and expert parallelism go on inside each stage as without them.
For that, all stages run the very same instructions in every tick: a chunk's weights and caches are picked out of those
of the stage by its number, and a stage without work computes what nobody reads. A branch per chunk would have devices
wait in one that others do not take, wherever the compiler lets them permute something.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from decodax.layers.attention.attend_kernels import DECODE_TOKENS
from decodax.layers.attention.mask import Mask
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.part import MicroBatch, at, cut, part_of
from decodax.layers.kv_cache.stacked import Stacked
from decodax.layers.kv_cache.staged import Staged
from decodax.sharding.pipeline import Schedule, Stages, best_micro_batches
from decodax.sharding.regions import on_each_device


class Rows(NamedTuple):
    """What belongs to the rows of a forward and goes with them through the layers."""

    position: Int[Array, "B T"]
    row_length: Int[Array, "B T"]
    mask: Mask


# (place, weights of its block, hidden states, what belongs to their rows, cache) -> hidden states, new rows
RunLayer = Callable[[int, Any, Array, Rows, Any], tuple[Array, Any]]


def run_in_stages(
    run_layer: RunLayer,
    stages: Stages,
    execution: Execution,
    blocks: tuple[Any, ...],
    hidden: Float[Array, "B T D"],
    rows: Rows,
    caches: tuple[Any, ...],
) -> tuple[Float[Array, "B T D"], tuple[Stacked, ...]]:
    """The hidden states after the stages' layers, and the new rows of each of their places.

    blocks, caches: those of the stages' places, in stacks of layers: caches as `Stacked`, or `Staged` with a stacked
    cache and stacked rows, or None.
    """
    assert execution.mesh is not None
    (axis,) = execution.mesh_axes("L")
    batch, num_tokens = hidden.shape[:2]
    groups = execution.num_parts("B", batch)
    schedule = Schedule(
        stages.num_stages, stages.chunks, _micro_batches(execution, stages, batch // groups, batch * num_tokens)
    )
    # A kernel would have the part of the cache copied for it. For a chunk of a prompt that is little beside the rest.
    in_place = execution.runs_xla or (execution.implementation is None and num_tokens <= DECODE_TOKENS)
    ring = [(stage, (stage + 1) % stages.num_stages) for stage in range(stages.num_stages)]

    def on_stage(stage, blocks, stacks, staged_at, hidden, rows):
        stage = stage[0]

        def run_chunk(chunk: Array, hidden: Array, part: MicroBatch) -> tuple[Array, tuple[Any, ...]]:
            own_rows, new = _part_of_rows(rows, part), []
            hidden = execution.scattered(hidden)
            for index, place in enumerate(stages.stacks):
                weights = jax.tree.map(lambda stack: at(chunk, stack), blocks[index])
                cache = _read(stacks[index], staged_at[index], chunk, part, in_place)
                hidden, added = run_layer(place, weights, hidden, own_rows, cache)
                new.append(added)
            return execution.whole(hidden), tuple(new)

        def work(tick: Array, stage: Array | int) -> tuple[Array, MicroBatch, Array]:
            chunk, index, is_busy = schedule.work(tick, stage)
            index = jnp.clip(index, 0, schedule.micro_batches - 1)
            part = MicroBatch(index, schedule.micro_batches, groups)
            return jnp.clip(chunk, 0, stages.chunks - 1), part, is_busy

        def run_tick(tick: Array, carried: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
            waiting, handed, collected = carried
            chunk, part, is_busy = work(tick, stage)
            entering = jnp.where(stage == 0, part.cut(waiting), handed)
            left, new = run_chunk(chunk, entering, part)
            collected = jax.tree.map(lambda held, added: part.put_at(chunk, held, added, is_busy), collected, new)
            handed = jax.lax.ppermute(left, axis, ring)
            # What comes around to the first stage waits there for its next chunk; after the last it is the result.
            _, part, is_busy = work(tick, stages.num_stages - 1)
            return part.put(waiting, handed, is_busy), handed, collected

        first = work(jnp.int32(0), 0)[1]
        left, new = jax.eval_shape(lambda: run_chunk(jnp.int32(0), first.cut(hidden), first))
        collected = jax.tree.map(lambda leaf: jnp.zeros((stages.chunks, batch, *leaf.shape[1:]), leaf.dtype), new)
        nothing = jnp.zeros(left.shape, left.dtype)
        with jax.named_scope("pipeline"):
            hidden, _, collected = jax.lax.fori_loop(0, schedule.num_ticks, run_tick, (hidden, nothing, collected))
        return jax.lax.psum(jnp.where(stage == 0, hidden, jnp.zeros_like(hidden)), axis), collected

    held, everywhere = PartitionSpec(axis), PartitionSpec()
    in_specs = (held, held, held, everywhere, everywhere, everywhere)
    run = on_each_device(on_stage, execution.mesh, in_specs, (everywhere, held), over={axis})
    numbers = jnp.arange(stages.num_stages, dtype=jnp.int32)
    stacks = tuple(map(_stacks_of, caches))
    staged_at = tuple(cache.position if isinstance(cache, Staged) else None for cache in caches)
    hidden, new = run(numbers, blocks, stacks, staged_at, hidden, rows)
    return hidden, tuple(map(Stacked, new))


def _micro_batches(execution: Execution, stages: Stages, num_rows: int, num_tokens: int) -> int:
    """How many micro-batches `num_rows` rows of each group are cut into.

    Raises ValueError if so many are asked for that they do not divide.
    """
    asked = execution.pipeline.micro_batches
    if asked is None:
        return best_micro_batches(num_rows, num_tokens, stages.num_stages, stages.chunks)
    if num_rows % asked:
        raise ValueError(
            f"{num_rows} rows (of a batch, on each part of the mesh that rows are split over) do not divide into "
            f"micro_batches={asked}: use a divisor, or None"
        )
    return asked


def _stacks_of(cache: Any) -> tuple[Any, Any]:
    """What of a cache, and of rows staged with it, has the layers in front."""
    bare, staged = (cache.cache, cache.rows.each) if isinstance(cache, Staged) else (cache, None)
    return None if bare is None else bare.each, staged


def _read(stacks: tuple[Any, Any], staged_at: Array | None, chunk: Array, part: MicroBatch, in_place: bool) -> Any:
    """What a layer gets as its cache for some of the rows."""
    cache, staged = stacks
    cache = None if cache is None else part_of(cache, chunk, part, in_place=in_place)
    return cache if staged_at is None else Staged(cache, cut(staged, chunk, part), part.cut(staged_at))


def _part_of_rows(rows: Rows, part: MicroBatch) -> Rows:
    """The rows' own part; what a mask holds once for all rows stays."""
    batch = rows.position.shape[0]
    return jax.tree.map(lambda leaf: part.cut(leaf) if leaf.shape[0] == batch else leaf, rows)
