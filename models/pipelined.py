"""Runs a model's layers in pipeline stages: each device holds some of the layers, and rows go from one to the next.

It all happens inside one forward, so whatever decodes with `Model.apply` decodes in stages: in every tick a stage takes
a micro-batch of rows, runs one chunk of its layers on it, and hands the hidden states to the stage behind it, the last
stage to the first (`sharding/pipeline.py` says when who does what). That is all that goes between stages, and the
result, once, to all of them. Caches stay where their layers are; a stage reads the micro-batch's part of its own.

Only the axis of stages is divided by hand; tensor, data and expert parallelism go on inside each stage as without them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from decodax.layers.attention.mask import Mask
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.part import MicroBatch, part_of
from decodax.layers.kv_cache.stacked import Stacked
from decodax.layers.kv_cache.staged import Staged
from decodax.sharding.pipeline import Schedule, Stages, best_micro_batches
from decodax.sharding.rules import automatic


class Rows(NamedTuple):
    """What belongs to the rows of a forward and goes with them through the layers."""

    position: Int[Array, "B T"]
    row_length: Int[Array, "B T"]
    mask: Mask


RunLayer = Callable[[int, Any, Float[Array, "B T D"], Rows, Any], tuple[Float[Array, "B T D"], Any]]
"""(place, parameters of its block, hidden states, rows, cache) -> hidden states, new rows."""


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

    blocks, caches: those of the stages' own places; every array has the stages in front, caches as `Stacked`, or
    `Staged` with a stacked cache and stacked rows, or None.
    """
    assert execution.mesh is not None
    (axis,) = execution.mesh_axes("L")
    batch, num_tokens = hidden.shape[:2]
    groups = execution.num_parts("B", batch)
    schedule = Schedule(
        stages.num_stages, stages.chunks, _micro_batches(execution, stages, batch // groups, batch * num_tokens)
    )
    in_place = execution.reads_parts_in_place(num_tokens)
    held, everywhere = PartitionSpec(axis), PartitionSpec()
    stacks = tuple(_stack_of(cache) for cache in caches)
    staged_at = tuple(cache.position if isinstance(cache, Staged) else None for cache in caches)

    def on_stage(stage, blocks, stacks, staged_at, hidden, rows):
        stage = stage[0]
        blocks, stacks = jax.tree.map(lambda leaf: leaf[0], (blocks, stacks))
        caches = tuple(map(_with_position, stacks, staged_at))

        def run_chunk(chunk: int, hidden: Array, part: MicroBatch) -> tuple[Array, tuple[Any, ...]]:
            own_rows, new = _part_of_rows(rows, part), []
            for place in stages.chunk(chunk):
                index = place - stages.before
                cache = caches[index]
                if cache is not None and part.count > 1:
                    cache = part_of(cache, part, in_place=in_place)
                hidden, added = run_layer(place, blocks[index], hidden, own_rows, cache)
                new.append(added)
            return hidden, tuple(new)

        def micro_batch(index: Array) -> MicroBatch:
            last = schedule.micro_batches - 1
            return MicroBatch(jnp.clip(index, 0, last), schedule.micro_batches, groups)

        def tick(tick: Array, carried: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
            waiting, handed, collected = carried
            chunk, index, is_busy = schedule.work(tick, stage)
            chunk, part = jnp.clip(chunk, 0, stages.chunks - 1), micro_batch(index)
            entering = jnp.where(stage == 0, part.cut(waiting), handed)
            branches = [
                lambda hidden, part, chunk=chunk: run_chunk(chunk, hidden, part) for chunk in range(stages.chunks)
            ]
            left, new = jax.lax.switch(chunk, branches, entering, part)
            collected = jax.tree.map(lambda held, added: part.put_at(chunk, held, added, is_busy), collected, new)
            ring = [(one, (one + 1) % stages.num_stages) for one in range(stages.num_stages)]
            handed = jax.lax.ppermute(left, axis, ring)
            # What comes around to the first stage waits there for its next chunk; after the last it is the result.
            _, index, is_busy = schedule.work(tick, stages.num_stages - 1)
            return micro_batch(index).put(waiting, handed, is_busy), handed, collected

        shapes = jax.eval_shape(lambda: run_chunk(0, micro_batch(jnp.int32(0)).cut(hidden), micro_batch(jnp.int32(0))))
        collected = jax.tree.map(lambda leaf: jnp.zeros((stages.chunks, batch, *leaf.shape[1:]), leaf.dtype), shapes[1])
        nothing = jnp.zeros(shapes[0].shape, hidden.dtype)
        with jax.named_scope("pipeline"):
            hidden, _, collected = jax.lax.fori_loop(0, schedule.num_ticks, tick, (hidden, nothing, collected))
        result = jax.lax.psum(jnp.where(stage == 0, hidden, jnp.zeros_like(hidden)), axis)
        new = [jax.tree.map(lambda leaf, chunk=chunk: leaf[chunk], collected) for chunk in range(stages.chunks)]
        return result, jax.tree.map(lambda leaf: leaf[None], tuple(added for chunk in new for added in chunk))

    run = jax.shard_map(
        on_stage,
        mesh=automatic(execution.mesh),
        axis_names={axis},
        in_specs=(held, held, held, everywhere, everywhere, everywhere),
        out_specs=(everywhere, held),
        check_vma=False,
    )
    number = jnp.arange(stages.num_stages, dtype=jnp.int32)
    hidden, new = run(number, blocks, stacks, staged_at, hidden, rows)
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


def _stack_of(cache: Any) -> Any:
    """The arrays of a cache that have the stages in front: those of the cache, and of rows staged with it."""
    if isinstance(cache, Staged):
        return _stack_of(cache.cache), cache.rows.each
    return None if cache is None else cache.each


def _with_position(stack: Any, staged_at: Array | None) -> Any:
    return stack if staged_at is None else Staged(*stack, staged_at)


def _part_of_rows(rows: Rows, part: MicroBatch) -> Rows:
    """The rows' own part; what a mask holds once for all rows stays."""
    batch = rows.position.shape[0]
    return jax.tree.map(lambda leaf: part.cut(leaf) if leaf.shape[0] == batch else leaf, rows)
