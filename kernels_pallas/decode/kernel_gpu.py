"""Runs decode attention over the tiles of a cache on Hopper GPUs, for all decode kernels.

LeanAttention's split (arXiv 2405.10480, see partition.py) with FlashAttention-2's online softmax (arXiv 2307.08691)
inside. An owner is a row, a key-value head and a group of packed queries (queries_gpu.py), so each cached token is
read once for all queries of a group:

    grid (runs):     | run 0              | run 1              | run 2              |   equal numbers of tiles
    tiles (64 tokens): 0 1 2 3 4 5 6 7 8 9 0 1 2 0 1 0 1 2 3 4 5 ...
    owners:          | row 0, head 0               | row 0, head 1 | ...
    partials:        | p. 0               | p. 1   | p. 2          | ...                softmax of an owner within a run

Keys and values of the next tiles are loaded (TMA, several stages) while one is multiplied, across the borders of
owners. A partial softmax is written as its normalised output and its log-sum-exp, both float32; a second kernel merges
an owner's partial softmaxes with the new tokens (merge_gpu.py). The decode kernels differ in where tiles are
(tiles_gpu.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from decodax.kernels_pallas.compat import Warpgroup, gpu_kernel
from decodax.kernels_pallas.decode.merge_gpu import Merge
from decodax.kernels_pallas.decode.new_tokens import NewTokens
from decodax.kernels_pallas.decode.partition import Partition, num_slots, partition
from decodax.kernels_pallas.decode.queries_gpu import BLOCK_QUERIES, ROW, Sizes, shared
from decodax.kernels_pallas.decode.tiles_gpu import TILE_TOKENS, Tiles
from decodax.kernels_pallas.hopper import CORE_SHARED_BYTES, PROGRAM_SHARED_BYTES, num_cores
from decodax.kernels_pallas.online_softmax import (
    MASKED,
    OnlineSoftmax,
    absorb_gpu,
    capped,
    empty_softmax_gpu,
    finish_gpu,
)
from decodax.kernels_pallas.selection import every_reason

_OTHER_SHARED_BYTES = 4_096  # barriers, sums within a warpgroup, alignment
_MAX_STAGES = 6
INTERPRETED_RUNS = 3


class _Plan(NamedTuple):
    """Shared memory of the first kernel: number of tiles in flight, and of programs that a core runs at once."""

    num_stages: int
    programs_per_core: int


def _plan(sizes: Sizes, item_bytes: int) -> _Plan:
    query = sizes.num_blocks * BLOCK_QUERIES * sizes.head_size * item_bytes
    output = BLOCK_QUERIES * sizes.output_columns * 4
    stage = TILE_TOKENS * (sizes.head_size + sizes.value_size) * item_bytes
    for programs, room in ((2, CORE_SHARED_BYTES // 2 - 1_024), (1, PROGRAM_SHARED_BYTES)):
        num_stages = (room - _OTHER_SHARED_BYTES - query - output) // stage
        if num_stages >= 2:
            return _Plan(min(num_stages, _MAX_STAGES), programs)
    return _Plan(1, 1)


@every_reason
def unsupported_sizes(
    query: Any, key: Any, value: Any, new: NewTokens | None, *, interpret: bool
) -> Iterator[str | None]:
    """Every reason why the kernels do not support operands of these sizes and dtypes."""
    dtypes = ("bfloat16", "float16", "float32") if interpret else ("bfloat16", "float16")
    given = {str(operand.dtype) for operand in (query, key, value, *(() if new is None else new[:2]))}
    if len(given) > 1 or not given <= set(dtypes):
        yield f"queries, keys and values must all be {' or all '.join(dtypes)}, these are {', '.join(sorted(given))}"
    for name, size in (("keys", key.shape[-1]), ("values", value.shape[-1])):
        if size % 16 or not 32 <= size <= 256:
            yield f"the head size of {name} must be a multiple of 16 in 32..256, it is {size}"


def decode(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tables: tuple[jax.Array, ...],
    num_tiles: jax.Array,
    new: NewTokens | None,
    *,
    tiles: Tiles,
    name: str,
    scale: float,
    softcap: float | None,
    first: jax.Array | None = None,
    num_sink_tokens: int = 0,
    sink_logits: jax.Array | None = None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, I] and log-sum-exp [B, T, N] of queries over the cached and the new tokens.

    The work is split into as many runs as the GPU runs at once; the result depends on that only in the order of sums.

    query: [B, T, N, H].
    key, value: the cache, in any shape whose last axis is the head's.
    tables: integers that `tiles` needs.
    num_tiles: [B, K], of each row and head.
    new: tokens that are not in the cache.
    tiles: locates the tiles.
    name: of the kernel.
    scale, softcap, first, num_sink_tokens, sink_logits: as for `flash_decode`.
    interpret: run on CPU.
    """
    batch, num_queries, num_heads, head_size = query.shape
    num_kv_heads = num_tiles.shape[1]
    sizes = Sizes(num_heads // num_kv_heads, num_queries, head_size, value.shape[-1])
    plan = _plan(sizes, query.dtype.itemsize)
    grouped = query.reshape(batch, num_queries, num_kv_heads, sizes.group, head_size)
    packed = sizes.pack(grouped).reshape(-1, sizes.num_blocks, sizes.block_rows, head_size)
    num_runs = INTERPRETED_RUNS if interpret else num_cores() * plan.programs_per_core
    split = partition(jnp.repeat(num_tiles.reshape(-1), sizes.num_groups), num_runs)
    walk = _Walk(tiles, sizes, plan, num_kv_heads, num_runs, scale, softcap, num_sink_tokens, Warpgroup(interpret))
    rows = () if first is None else (sizes.pack_rows(first),)
    partials = walk(name, packed, key, value, tables, split, rows)
    merge = Merge(sizes, num_kv_heads, scale, softcap, Warpgroup(interpret))
    output, lse = merge(name, packed, partials, split, new, sink_logits)
    per_row = (batch, num_kv_heads, sizes.num_groups, sizes.num_blocks)
    output = sizes.unpack(output.reshape(*per_row, sizes.block_rows, sizes.value_size))
    return output, sizes.unpack(lse[:, :, : sizes.block_rows].reshape(*per_row, sizes.block_rows))


@dataclass(frozen=True)
class _Walk:
    """The first kernel."""

    tiles: Tiles
    sizes: Sizes
    plan: _Plan
    num_kv_heads: int
    num_runs: int
    scale: float
    softcap: float | None
    num_sink_tokens: int
    warpgroup: Warpgroup

    def __call__(
        self,
        name: str,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        tables: tuple[jax.Array, ...],
        split: Partition,
        rows: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, jax.Array]:
        """The partial softmaxes: outputs [slots, blocks, block_rows, I] and log-sum-exps [slots, blocks, 64]."""
        sizes, dtype = self.sizes, query.dtype
        slots = num_slots(query.shape[0], self.num_runs)
        head_size, value_size, num_stages = sizes.head_size, sizes.value_size, self.plan.num_stages

        def body(*refs: Any) -> None:
            (start, first_owner, offset, query_ref, key_ref, value_ref), refs = refs[:6], refs[6:]
            table_refs, refs = refs[: len(tables)], refs[len(tables) :]
            row_refs, refs = refs[: len(rows)], refs[len(rows) :]
            run = jax.lax.axis_index("run")
            memory = _WalkMemory(query_ref, key_ref, value_ref, table_refs, row_refs, offset, *refs)
            self._walk_run(memory, run, start[run], start[run + 1], first_owner[run])

        body.__name__ = name
        kernel = gpu_kernel(
            body,
            (
                jax.ShapeDtypeStruct((slots, sizes.num_blocks, sizes.block_rows, value_size), jnp.float32),
                jax.ShapeDtypeStruct((slots, sizes.num_blocks, BLOCK_QUERIES), jnp.float32),
            ),
            grid=(self.num_runs,),
            grid_names=("run",),
            scratch_types=[
                shared((sizes.num_blocks, BLOCK_QUERIES, head_size), dtype),
                shared((num_stages, TILE_TOKENS, head_size), dtype),
                shared((num_stages, TILE_TOKENS, value_size), dtype),
                shared((BLOCK_QUERIES, sizes.output_columns), jnp.float32),
                plgpu.Barrier(num_arrivals=sizes.num_blocks),
                plgpu.Barrier(num_arrivals=self.tiles.num_pieces, num_barriers=num_stages),
                plgpu.Barrier(num_arrivals=self.tiles.num_pieces, num_barriers=num_stages),
            ],
            interpret=self.warpgroup.interpret,
        )
        return kernel(split.start, split.first_owner, split.offset, query, key, value, *tables, *rows)

    def _walk_run(
        self, memory: "_WalkMemory", run: jax.Array, start: jax.Array, end: jax.Array, first_owner: jax.Array
    ) -> None:
        """Runs the tiles start .. end - 1."""
        num_stages = self.plan.num_stages

        def fetch(tile: jax.Array, owner: jax.Array, cache: Any, shared: Any, barrier: Any) -> None:
            stage = jax.lax.rem(tile - start, jnp.int32(num_stages))

            @pl.when(tile < end)
            def _():
                tokens = TILE_TOKENS // self.tiles.num_pieces
                for i in range(self.tiles.num_pieces):
                    piece = self.tiles.piece(memory.tables, self._slab(owner), tile - memory.offset[owner], i)
                    target = shared.at[stage, pl.ds(i * tokens, tokens)]
                    plgpu.copy_gmem_to_smem(cache.at[piece], target, barrier.at[stage])

        ahead = first_owner
        for i in range(num_stages):
            ahead = memory.owner_of(ahead, start + i)
            fetch(start + i, ahead, memory.key, memory.key_shared, memory.key_arrived)
            fetch(start + i, ahead, memory.value, memory.value_shared, memory.value_arrived)

        def step(tile: jax.Array, carry: tuple[jax.Array, jax.Array, tuple[OnlineSoftmax, ...]]) -> Any:
            owner, ahead, seen = carry
            owner = memory.owner_of(owner, tile)
            stage = jax.lax.rem(tile - start, jnp.int32(num_stages))
            is_first = jnp.logical_or(tile == start, tile == memory.offset[owner])
            pl.when(is_first)(lambda: self._load_queries(memory, owner))
            next_tile = tile + num_stages
            ahead = memory.owner_of(ahead, next_tile)
            in_owner = tile - memory.offset[owner]

            is_unmasked = self.tiles.is_unmasked(memory.tables, self._slab(owner), in_owner)
            pl.when(jnp.logical_not(is_unmasked))(lambda: self._clear_unread_values(memory, owner, in_owner, stage))
            plgpu.barrier_wait(memory.key_arrived.at[stage])
            value = memory.value_shared.at[stage]  # quantised values would be scaled here
            absorbed = []
            for i, block in enumerate(seen):
                score = self._scores(memory, owner, in_owner, stage, is_unmasked, i)
                if i + 1 == len(seen):
                    fetch(next_tile, ahead, memory.key, memory.key_shared, memory.key_arrived)
                if i == 0:
                    pl.when(is_unmasked)(lambda: plgpu.barrier_wait(memory.value_arrived.at[stage]))
                absorbed.append(absorb_gpu(self.warpgroup, block, score, value, value.dtype))
            fetch(next_tile, ahead, memory.value, memory.value_shared, memory.value_arrived)
            is_last = jnp.logical_or(tile + 1 == end, tile + 1 == memory.offset[owner + 1])
            seen = jax.lax.cond(
                is_last, lambda seen: self._write_partial(memory, owner + run, seen), lambda seen: seen, tuple(absorbed)
            )
            return owner, ahead, seen

        jax.lax.fori_loop(start, end, step, (first_owner, ahead, self._empty_softmax()))
        plgpu.wait_smem_to_gmem(0)

    def _empty_softmax(self) -> tuple[OnlineSoftmax, ...]:
        sizes = self.sizes
        return tuple(
            empty_softmax_gpu(self.warpgroup, BLOCK_QUERIES, sizes.value_size) for _ in range(sizes.num_blocks)
        )

    def _slab(self, owner: jax.Array) -> jax.Array:
        return jax.lax.div(owner, jnp.int32(self.sizes.num_groups))

    def _load_queries(self, memory: "_WalkMemory", owner: jax.Array) -> None:
        for i in range(self.sizes.num_blocks):
            target = memory.query_shared.at[i, pl.ds(0, self.sizes.block_rows)]
            plgpu.copy_gmem_to_smem(memory.query.at[owner, i], target, memory.query_arrived)
        plgpu.barrier_wait(memory.query_arrived)

    def _scores(
        self,
        memory: "_WalkMemory",
        owner: jax.Array,
        tile: jax.Array,
        stage: jax.Array,
        is_unmasked: jax.Array,
        block: int,
    ) -> jax.Array:
        warpgroup, sizes, slab, shape = self.warpgroup, self.sizes, self._slab(owner), (BLOCK_QUERIES, TILE_TOKENS)
        key = memory.key_shared.at[stage]  # quantised keys: the scale belongs on the score
        score = warpgroup.dot(memory.query_shared.at[block], key, transpose_right=True)
        score = capped(score, self.scale, self.softcap)

        def masked(score: jax.Array) -> jax.Array:
            token = warpgroup.iota(shape, 1)
            allowed = self.tiles.is_filled(memory.tables, slab, tile, token)
            for rows in memory.rows:
                row = jax.lax.div(slab, jnp.int32(self.num_kv_heads))
                row_block = jax.lax.rem(owner, jnp.int32(sizes.num_groups)) * sizes.num_blocks + block
                position = self.tiles.position(memory.tables, slab, tile)
                first = warpgroup.load(rows.at[row, row_block], ROW, is_shared=False) - position
                in_window = token >= warpgroup.rows(first, shape)
                allowed = allowed & (in_window | (token < self.num_sink_tokens - position))
            return jnp.where(allowed, score, MASKED)

        return jax.lax.cond(is_unmasked, lambda score: score, masked, score)

    def _clear_unread_values(self, memory: "_WalkMemory", owner: jax.Array, tile: jax.Array, stage: jax.Array) -> None:
        """Zeros values that no query attends to: unwritten ones may be non-finite, which a weight of 0 does not cancel.

        Done before the scores, which then need not be kept meanwhile.
        """
        plgpu.barrier_wait(memory.value_arrived.at[stage])
        columns = self.sizes.output_columns
        token = self.warpgroup.iota((TILE_TOKENS, columns), 0)
        allowed = self.tiles.may_be_read(memory.tables, self._slab(owner), tile, token)
        for start in range(0, self.sizes.value_size, columns):
            ref = memory.value_shared.at[stage, pl.ds(0, TILE_TOKENS), pl.ds(start, columns)]
            value = self.warpgroup.load(ref)
            ref[...] = jnp.where(allowed, value, jnp.zeros_like(value))
        plgpu.commit_smem()

    def _write_partial(
        self, memory: "_WalkMemory", slot: jax.Array, seen: tuple[OnlineSoftmax, ...]
    ) -> tuple[OnlineSoftmax, ...]:
        """Writes the partial softmax of an owner, and returns the empty state for the next one."""
        rows, columns = self.sizes.block_rows, self.sizes.output_columns
        for i, block in enumerate(seen):
            for start in range(0, self.sizes.value_size, columns):
                piece = OnlineSoftmax(block.maximum, block.total, block.output[:, start : start + columns])
                output, lse = finish_gpu(self.warpgroup, piece)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                memory.output_shared[...] = output
                plgpu.commit_smem()
                target = memory.output.at[slot, i, pl.ds(0, rows), pl.ds(start, columns)]
                plgpu.copy_smem_to_gmem(memory.output_shared.at[pl.ds(0, rows)], target)
                if start == 0:
                    memory.lse[slot, i] = lse
        return self._empty_softmax()


@dataclass(frozen=True)
class _WalkMemory:
    """The memory of a program of the first kernel."""

    query: Any
    key: Any
    value: Any
    tables: tuple[Any, ...]
    rows: tuple[Any, ...]
    offset: Any
    output: Any
    lse: Any
    query_shared: Any
    key_shared: Any
    value_shared: Any
    output_shared: Any
    query_arrived: Any
    key_arrived: Any
    value_arrived: Any

    def owner_of(self, owner: jax.Array, tile: jax.Array) -> jax.Array:
        """The owner of a tile that is not before those of `owner`; the last owner for tiles beyond the last."""
        last = self.offset.shape[0] - 2

        def is_past(owner: jax.Array) -> jax.Array:
            return jnp.logical_and(owner < last, self.offset[owner + 1] <= tile)

        return jax.lax.while_loop(is_past, lambda owner: owner + 1, owner)
