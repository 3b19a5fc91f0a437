"""Runs a model's layers with pipeline parallelism: each stage holds some layers, and micro-batches pass through all.

It all happens inside one forward, so whatever decodes with `Model.apply` decodes in stages. In every tick a stage takes
a micro-batch of rows, runs one chunk of its layers on it, and permutes the hidden states to the next stage, from the
last stage to the first (`sharding/pipeline.py` has the schedule). Nothing else is sent between stages, except the
result, once, to all of them. Caches stay where their layers are; a stage reads the micro-batch's rows of its own.

Only the axis of stages is divided by hand; tensor, data and expert parallelism work inside each stage as without it.
For that, all stages run the same instructions in every tick: a chunk's weights and caches are indexed by its number in
those of the stage, and a stage without work computes a result that is not read. With a branch per chunk, devices would
wait in a branch that others do not take, wherever the compiler inserts a permute.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.decode.new_tokens import MAX_STEP_TOKENS
from decodax.layers.attention.mask import Mask
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.micro_batch import MicroBatch, at, cut, micro_batch_cache
from decodax.layers.kv_cache.stacked import Stacked
from decodax.layers.kv_cache.staged import Staged
from decodax.models.config import ModelConfig
from decodax.models.transformer import Block, Forward
from decodax.sharding.pipeline import Schedule, Stages, best_micro_batches
from decodax.sharding.regions import on_each_device


class Rows(NamedTuple):
    """Data of a forward's rows that goes with them through the layers."""

    position: Int[Array, "B T"]
    row_length: Int[Array, "B T"]
    mask: Mask


# (place, weights of its block, hidden states, data of their rows, cache) -> hidden states, cache update
RunLayer = Callable[[int, Any, Array, Rows, Any], tuple[Array, Any]]


def apply_in_stages(
    config: ModelConfig,
    execution: Execution,
    stages: Stages,
    params: dict[str, Any],
    hidden: Float[Array, "B T D"],
    rows: Rows,
    caches: tuple[Any, ...] | None,
    layers: tuple[int, int],
    capture: tuple[int, ...],
) -> Forward:
    """`Model.apply` on a mesh with a pipeline axis: the layers before the stages, the stages, the layers after them.

    config, execution, stages, params: of the model.
    hidden: input of the first layer.
    rows: the rows' positions, lengths and mask.
    caches: one entry per place; None: nothing precedes these tokens.
    layers, capture: as for `Model.apply`.
    Raises NotImplementedError for less than all layers, or hidden states between them.
    """
    _check_all_layers(config.num_layers, layers, capture)
    blocks, size = config.blocks, config.hidden_size
    caches = (None,) * stages.num_places if caches is None else caches
    captured = {0: hidden} if 0 in capture else {}

    def run_layer(place: int, weights: Any, hidden: Array, rows: Rows, cache: Any) -> tuple[Array, Any]:
        block = Block(blocks[stages.layers(place)[0]], size, execution)
        with jax.named_scope(f"blocks_{place}"):
            return block.apply({"params": weights}, hidden, *rows[:2], cache, rows.mask)[:2]

    def run_on_all(places: range, hidden: Array) -> tuple[Array, tuple[Any, ...]]:
        new = []
        for place in places:
            hidden, added = run_layer(place, params[f"blocks_{place}"], hidden, rows, caches[place])
            new.append(added)
        return hidden, tuple(new)

    own = stages.stacks
    hidden, before = run_on_all(range(stages.before), hidden)
    weights = tuple(params[f"blocks_{place}"] for place in own)
    held = caches[own.start : own.stop]
    hidden, inside = run_in_stages(run_layer, stages, execution, weights, hidden, rows, held)
    hidden, after = run_on_all(range(own.stop, stages.num_places), hidden)
    if config.num_layers in capture:
        captured[config.num_layers] = hidden
    return Forward(hidden, (*before, *inside, *after), captured)


def run_in_stages(
    run_layer: RunLayer,
    stages: Stages,
    execution: Execution,
    blocks: tuple[Any, ...],
    hidden: Float[Array, "B T D"],
    rows: Rows,
    caches: tuple[Any, ...],
) -> tuple[Float[Array, "B T D"], tuple[Stacked, ...]]:
    """The hidden states after the stages' layers, and the cache updates of each of their places.

    run_layer: runs one layer.
    stages, execution: of the model.
    blocks: weights of the stages' places, in stacks of layers.
    hidden, rows: as for `apply_in_stages`.
    caches: of the stages' places, in stacks of layers: `Stacked`, or `Staged` with a stacked cache and a stacked
        update, or None.
    """
    assert execution.mesh is not None
    (axis,) = execution.mesh_axes("L")
    batch, num_tokens = hidden.shape[:2]
    groups = execution.num_shards("B", batch)
    schedule = Schedule(
        stages.num_stages, stages.chunks, _micro_batches(execution, stages, batch // groups, batch * num_tokens)
    )
    # For a kernel the micro-batch's rows of the cache are copied. In chunked prefill that is a small cost.
    in_place = execution.runs_xla or (execution.implementation is None and num_tokens <= MAX_STEP_TOKENS)
    ring = [(stage, (stage + 1) % stages.num_stages) for stage in range(stages.num_stages)]

    def on_stage(stage, blocks, stacks, staged_at, hidden, rows):
        stage = stage[0]

        def run_chunk(chunk: Array, hidden: Array, micro_batch: MicroBatch) -> tuple[Array, tuple[Any, ...]]:
            own_rows, new = _micro_batch_rows(rows, micro_batch), []
            hidden = execution.sequence_sharded(hidden)
            for index, place in enumerate(stages.stacks):
                weights = jax.tree.map(lambda stack: at(chunk, stack), blocks[index])
                cache = _read(stacks[index], staged_at[index], chunk, micro_batch, in_place)
                hidden, added = run_layer(place, weights, hidden, own_rows, cache)
                new.append(added)
            return execution.sequence_gathered(hidden), tuple(new)

        def work(tick: Array, stage: Array | int) -> tuple[Array, MicroBatch, Array]:
            chunk, index, is_busy = schedule.work(tick, stage)
            index = jnp.clip(index, 0, schedule.micro_batches - 1)
            micro_batch = MicroBatch(index, schedule.micro_batches, groups)
            return jnp.clip(chunk, 0, stages.chunks - 1), micro_batch, is_busy

        def run_tick(tick: Array, carried: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
            waiting, handed, collected = carried
            chunk, micro_batch, is_busy = work(tick, stage)
            entering = jnp.where(stage == 0, micro_batch.cut(waiting), handed)
            left, new = run_chunk(chunk, entering, micro_batch)
            collected = jax.tree.map(
                lambda held, added: micro_batch.put_at(chunk, held, added, is_busy), collected, new
            )
            handed = jax.lax.ppermute(left, axis, ring)
            # What returns to the first stage waits there for its next chunk; after the last chunk it is the result.
            _, micro_batch, is_busy = work(tick, stages.num_stages - 1)
            return micro_batch.put(waiting, handed, is_busy), handed, collected

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


def _check_all_layers(num_layers: int, layers: tuple[int, int], capture: tuple[int, ...]) -> None:
    """Raises NotImplementedError for what a run in stages does not support."""
    ends = (0, num_layers)
    if layers != ends or not set(capture) <= set(ends):
        raise NotImplementedError(
            f"a model in pipeline stages runs all its {ends[1]} layers at once, and gives hidden states before and "
            f"after them only; asked for layers {layers[0]} to {layers[1]} and hidden states after {capture}. "
            "Split the model over the mesh axes tensor, expert or data for methods that run or read some of the layers"
        )


def _micro_batches(execution: Execution, stages: Stages, num_rows: int, num_tokens: int) -> int:
    """The number of micro-batches for `num_rows` rows of each group.

    Raises ValueError if the rows do not divide into the number asked for.
    """
    asked = execution.pipeline.micro_batches
    if asked is None:
        return best_micro_batches(num_rows, num_tokens, stages.num_stages, stages.chunks)
    if num_rows % asked:
        raise ValueError(
            f"{num_rows} rows (of a batch, on each shard of the rows) do not divide into micro_batches={asked}: use a "
            "divisor, or None"
        )
    return asked


def _stacks_of(cache: Any) -> tuple[Any, Any]:
    """The arrays of a cache, and of the update staged with it, whose first axis is the layers."""
    bare, staged = (cache.cache, cache.update.each) if isinstance(cache, Staged) else (cache, None)
    return None if bare is None else bare.each, staged


def _read(
    stacks: tuple[Any, Any], staged_at: Array | None, chunk: Array, micro_batch: MicroBatch, in_place: bool
) -> Any:
    """A layer's cache for a micro-batch of the rows."""
    cache, staged = stacks
    cache = None if cache is None else micro_batch_cache(cache, chunk, micro_batch, in_place=in_place)
    return cache if staged_at is None else Staged(cache, cut(staged, chunk, micro_batch), micro_batch.cut(staged_at))


def _micro_batch_rows(rows: Rows, micro_batch: MicroBatch) -> Rows:
    """The micro-batch's rows; what a mask holds once for all rows stays."""
    batch = rows.position.shape[0]
    return jax.tree.map(lambda leaf: micro_batch.cut(leaf) if leaf.shape[0] == batch else leaf, rows)
