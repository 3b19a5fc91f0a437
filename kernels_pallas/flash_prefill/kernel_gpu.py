"""Computes prefill attention on Hopper GPUs, with one warpgroup that loads and two that compute.

    grid (query blocks, B, N): the last queries first, as they have most keys under a causal mask

    block of 128 queries of a head   warpgroup 0: queries  0 ..  63  \\  both read the same blocks of keys and values
                                     warpgroup 1: queries 64 .. 127  /   in shared memory
                                     warpgroup 2 loads them (TMA) into slots: slot 0 | slot 1, 0, 1, ..

Each slot is refilled as soon as both warpgroups have read it, so that one's products hide the other's softmax and
nothing waits for memory (the warp specialisation of FlashAttention-3, arXiv 2407.08608, without its overlap within a
warpgroup). If blocks of 128 queries are too few for all multiprocessors, blocks have 64, and one warpgroup does
everything; that is also what tests mostly run.

Only blocks with an unmasked key are loaded. A block in which every query attends to every key needs no mask.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from decodax.kernels_pallas import compat
from decodax.kernels_pallas import online_softmax as softmax
from decodax.kernels_pallas.flash_prefill.spans import Blocks, Rows, Rules, Segments, blocks_to_read
from decodax.kernels_pallas.hopper import miscompiled_reason, num_cores
from decodax.kernels_pallas.selection import every_reason

_QUERIES = 64  # of a warpgroup: the rows of one wgmma
_SLOTS = 2
# Per thread of a warpgroup, of 65,536 for two that attend and one that loads.
_REGISTERS = {"loads": 40, "attends": 232}
_ROW_TILE = 8  # rows that TMA moves at once: the number of keys must be a multiple
_SMALL = 128  # keys that may be copied to pad them, however few queries there are


@every_reason
def unsupported_reason(query: Any, key: Any, value: Any, *, interpret: bool) -> Iterator[str | None]:
    """Every reason why the kernel does not support these operands (arrays or shapes)."""
    dtypes = {jnp.dtype(x.dtype) for x in (query, key, value)}
    taken = {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)} | ({jnp.dtype(jnp.float32)} if interpret else set())
    if len(dtypes) != 1 or not dtypes <= taken:
        names = ", ".join(jnp.dtype(x.dtype).name for x in (query, key, value))
        yield f"queries, keys and values must all be bfloat16 or all float16, these are {names}"
    for size in sorted({query.shape[3], value.shape[3]}):
        if size % 16 or size > 256:
            yield f"head sizes must be multiples of 16 up to 256, one is {size}"
    num_keys = key.shape[2]
    if num_keys % _ROW_TILE and not _may_pad(query.shape[1], num_keys):
        yield f"the capacity of a cache must be a multiple of {_ROW_TILE} tokens, this one is {num_keys}"
    yield None if interpret else miscompiled_reason()


def _may_pad(num_queries: int, num_keys: int) -> bool:
    """Whether keys may be copied to pad them: only if they are no more than the queries, as a chunk's own keys are."""
    return num_keys <= max(num_queries, _SMALL)


def flash_prefill(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S I"],
    rows: Rows,
    segments: Segments | None,
    sink_logits: Float[Array, " N"] | None,
    *,
    scale: float,
    rules: Rules,
    softcap: float | None,
    interpret: bool,
    num_warpgroups: int | None = None,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B T N"]]:
    """See `decodax.kernels_pallas.flash_prefill.flash_prefill`.

    num_warpgroups: that share a block of keys, 64 queries each: 1 or 2. None: 2 if that keeps a GPU busy.
    """
    batch, num_queries, num_heads, head_size = query.shape
    value_size = value.shape[3]
    if num_warpgroups is None:
        num_large_blocks = batch * num_heads * pl.cdiv(num_queries, 2 * _QUERIES)
        fits = segments is None or max(head_size, value_size) <= 192  # in 240 registers
        num_warpgroups = 2 if fits and num_large_blocks >= num_cores() else 1
    query_block = num_warpgroups * _QUERIES
    key_block = 128 if max(head_size, value_size) <= 128 and segments is None else 64  # as registers allow
    padding = -num_queries % query_block
    query = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    missing = max(key_block - key.shape[2], -key.shape[2] % _ROW_TILE)
    if missing > 0:
        key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))) for x in (key, value))
    if segments is not None:
        query_segments = jnp.pad(segments.query, ((0, 0), (0, padding)), mode="edge")
        segments = Segments(query_segments, jnp.pad(segments.key, ((0, 0), (0, max(missing, 0)))))
    blocks = blocks_to_read(
        rows, segments, rules, num_queries=num_queries, query_block=query_block, key_block=key_block
    )
    body = _Body(
        warpgroup=compat.Warpgroup(interpret),
        rules=rules,
        scale=scale,
        softcap=softcap,
        key_block=key_block,
        num_keys=key.shape[2],
        group=num_heads // key.shape[1],
        num_blocks=blocks.num_steps.shape[1],
        num_warpgroups=num_warpgroups,
        has_segments=segments is not None,
        has_sink_logits=sink_logits is not None,
    )
    operands = {"query": query, "key": key, "value": value, "blocks": tuple(blocks), "rows": tuple(rows)}
    if segments is not None:
        operands |= {"query_segment": segments.query, "key_segment": segments.key}
    if sink_logits is not None:
        operands["sink_logits"] = sink_logits.astype(jnp.float32)
    leaves, tree = jax.tree.flatten(operands)
    dtype = query.dtype
    scratch, scratch_tree = jax.tree.flatten(body.scratch(head_size, value_size, dtype))

    def flash_prefill(*refs: Any) -> None:
        inputs, outputs, memory = refs[: len(leaves)], refs[len(leaves) :][:2], refs[len(leaves) + 2 :]
        body(jax.tree.unflatten(tree, inputs), outputs, jax.tree.unflatten(scratch_tree, memory))

    output, lse = compat.gpu_kernel(
        flash_prefill,
        (
            jax.ShapeDtypeStruct((*query.shape[:3], value_size), dtype),
            jax.ShapeDtypeStruct((batch, num_heads, query.shape[1]), jnp.float32),
        ),
        grid=(blocks.num_steps.shape[1], batch, num_heads),
        grid_names=("query_block", "row", "head"),
        num_threads=num_warpgroups + 1 if num_warpgroups > 1 else None,
        thread_name="warpgroup" if num_warpgroups > 1 else None,
        scratch_types=scratch,
        interpret=interpret,
    )(*leaves)
    return output[:, :num_queries], jnp.swapaxes(lse, 1, 2)[:, :num_queries]


def _slot(step: Array) -> Array:
    return jax.lax.rem(step, jnp.int32(_SLOTS))


class _Place(NamedTuple):
    """The indices of a block of queries, and its blocks of keys."""

    row: Array
    head: Array
    kv_head: Array
    first_token: Array
    num_steps: Array
    num_sink_blocks: Array
    skipped: Array
    offset: Array
    length: Array
    num_sink_tokens: Array


class _Memory(NamedTuple):
    """Shared memory, one entry for each warpgroup or slot, and the barriers for full and free entries."""

    query: Any
    key: Any
    value: Any
    lse: Any
    query_full: Any
    key_full: Any
    value_full: Any
    consumed: Any
    cleared: Any
    query_segment: Any
    key_segment: Any
    output: Any


@dataclass(frozen=True)
class _Body:
    """The program of the warpgroups of a block of queries."""

    warpgroup: compat.Warpgroup
    rules: Rules
    scale: float
    softcap: float | None
    key_block: int
    num_keys: int
    group: int
    num_blocks: int
    num_warpgroups: int
    has_segments: bool
    has_sink_logits: bool

    def scratch(self, head_size: int, value_size: int, dtype: Any) -> _Memory:
        num_copies = 1 + self.has_segments
        per_warpgroup, per_slot = (self.num_warpgroups, _QUERIES), (_SLOTS, self.key_block)
        return _Memory(
            query=plgpu.SMEM((*per_warpgroup, head_size), dtype, transforms=compat.tiled(head_size, dtype)),
            key=plgpu.SMEM((*per_slot, head_size), dtype, transforms=compat.tiled(head_size, dtype)),
            value=plgpu.SMEM((*per_slot, value_size), dtype, transforms=compat.tiled(value_size, dtype)),
            lse=plgpu.SMEM(per_warpgroup, jnp.float32),
            query_full=plgpu.Barrier(num_arrivals=num_copies, num_barriers=self.num_warpgroups),
            key_full=plgpu.Barrier(num_arrivals=num_copies, num_barriers=_SLOTS),
            value_full=plgpu.Barrier(num_barriers=_SLOTS),
            consumed=plgpu.Barrier(num_arrivals=self.num_warpgroups, num_barriers=_SLOTS),
            cleared=plgpu.Barrier(num_arrivals=self.num_warpgroups),
            query_segment=plgpu.SMEM(per_warpgroup, jnp.int32) if self.has_segments else None,
            key_segment=plgpu.SMEM(per_slot, jnp.int32) if self.has_segments else None,
            output=None
            if value_size == head_size
            else plgpu.SMEM((*per_warpgroup, value_size), dtype, transforms=compat.tiled(value_size, dtype)),
        )

    def __call__(self, operands: dict[str, Any], output_refs: tuple[Any, Any], memory: _Memory) -> None:
        if self.num_warpgroups == 1:
            self._attend(operands, output_refs, memory, self._place(operands), jnp.int32(0))
            return
        index = jax.lax.axis_index("warpgroup")

        @pl.when(index < self.num_warpgroups)
        def attend() -> None:
            plgpu.set_max_registers(_REGISTERS["attends"], action="increase")
            self._attend(operands, output_refs, memory, self._place(operands), index)

        @pl.when(index == self.num_warpgroups)
        def load() -> None:
            plgpu.set_max_registers(_REGISTERS["loads"], action="decrease")
            place = self._place(operands)

            def one_block(step: Array, carry: None) -> None:
                pl.when(step >= _SLOTS)(lambda: plgpu.barrier_wait(memory.consumed.at[_slot(step)]))
                self._load(operands, memory, place, step)

            jax.lax.fori_loop(jnp.int32(0), place.num_steps, one_block, None)

    def _place(self, operands: dict[str, Any]) -> _Place:
        block = self.num_blocks - 1 - jax.lax.axis_index("query_block")
        row, head = (jax.lax.axis_index(name) for name in ("row", "head"))
        return _Place(
            row,
            head,
            jax.lax.div(head, jnp.int32(self.group)),
            block * (self.num_warpgroups * _QUERIES),
            *(ref[row, block] for ref in operands["blocks"]),
            *(ref[row] for ref in operands["rows"]),
        )

    def _first_keys(self, place: _Place, step: Array) -> tuple[Array, Array]:
        """The first key to attend to, and the first loaded: a last block that does not fit starts earlier."""
        first = Blocks.at(step, place.num_sink_blocks, place.skipped) * self.key_block
        return first, jnp.minimum(first, self.num_keys - self.key_block)

    def _load(self, operands: dict[str, Any], memory: _Memory, place: _Place, step: Array) -> None:
        """Starts the copies into a step's slot."""
        slot, keys = _slot(step), compat.aligned_rows(self._first_keys(place, step)[1], self.key_block)
        for name, full in (("key", memory.key_full), ("value", memory.value_full)):
            source = operands[name].at[place.row, place.kv_head, keys]
            plgpu.copy_gmem_to_smem(source, getattr(memory, name).at[slot], full.at[slot])
        if self.has_segments:
            source = operands["key_segment"].at[place.row, keys]
            plgpu.copy_gmem_to_smem(source, memory.key_segment.at[slot], memory.key_full.at[slot])

    def _attend(
        self, operands: dict[str, Any], output_refs: tuple[Any, Any], memory: _Memory, place: _Place, index: Array
    ) -> None:
        """Processes the queries of one warpgroup, from loading them to storing their output."""
        row, head = place.row, place.head
        tokens = compat.aligned_rows(place.first_token + index * _QUERIES, _QUERIES)
        query, lse_smem, is_full = (x.at[index] for x in (memory.query, memory.lse, memory.query_full))
        plgpu.copy_gmem_to_smem(operands["query"].at[row, tokens, head], query, is_full)
        if self.has_segments:
            source = operands["query_segment"].at[row, tokens]
            plgpu.copy_gmem_to_smem(source, memory.query_segment.at[index], is_full)
        loads_itself = self.num_warpgroups == 1
        if loads_itself:
            for step in range(_SLOTS):
                pl.when(step < place.num_steps)(lambda step=step: self._load(operands, memory, place, jnp.int32(step)))
        seen = softmax.empty_softmax_gpu(self.warpgroup, _QUERIES, memory.value.shape[-1])
        if self.has_sink_logits:
            column = self.warpgroup.column(_QUERIES)
            logit = operands["sink_logits"][head] * softmax.LOG2E
            seen = seen._replace(maximum=column + logit, total=column + 1.0)
        plgpu.barrier_wait(is_full)

        def one_block(step: Array, seen: softmax.OnlineSoftmax) -> softmax.OnlineSoftmax:
            seen = self._one_block(memory, place, index, step, seen)
            is_awaited = step + _SLOTS < place.num_steps
            if loads_itself:
                pl.when(is_awaited)(lambda: self._load(operands, memory, place, step + _SLOTS))
            else:
                pl.when(is_awaited)(lambda: plgpu.barrier_arrive(memory.consumed.at[_slot(step)]))
            return seen

        seen = jax.lax.fori_loop(jnp.int32(0), place.num_steps, one_block, seen)
        output, lse = softmax.finish_gpu(self.warpgroup, seen)
        # The queries are not needed any more: an output of their size is stored through their memory.
        output_smem = query if memory.output is None else memory.output.at[index]
        output_smem[...] = output.astype(output_smem.dtype)
        lse_smem[...] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(output_smem, output_refs[0].at[row, tokens, head])
        plgpu.copy_smem_to_gmem(lse_smem, output_refs[1].at[row, head, tokens])
        plgpu.wait_smem_to_gmem(0)

    def _one_block(
        self, memory: _Memory, place: _Place, index: Array, step: Array, seen: softmax.OnlineSoftmax
    ) -> softmax.OnlineSoftmax:
        """`seen` plus one block of keys, which the slot holds or soon will. Quantised keys would be scaled here."""
        slot, (first_unread, first_key) = _slot(step), self._first_keys(place, step)
        first_query = place.offset + place.first_token + index * _QUERIES
        query = memory.query.at[index]
        plgpu.barrier_wait(memory.key_full.at[slot])
        score = self.warpgroup.dot(query, memory.key.at[slot], transpose_right=True)
        score = softmax.capped(score, self.scale, self.softcap)

        def masked(score: Array) -> Array:
            query_index = self.warpgroup.iota(score.shape, 0) + first_query
            key_index = self.warpgroup.iota(score.shape, 1) + first_key
            allowed = self.rules.read(query_index, key_index, place.length, place.num_sink_tokens)
            return jnp.where(allowed & (key_index >= first_unread), score, softmax.MASKED)

        queries, keys = (first_query, first_query + _QUERIES - 1), (first_key, first_key + self.key_block - 1)
        is_unmasked = self.rules.read_all(queries, keys, place.length) & (first_key == first_unread)
        score = jax.lax.cond(is_unmasked, lambda score: score, masked, score)
        if self.has_segments:
            query_segment = self._segments(memory.query_segment.at[index], score.shape, 0)
            key_segment = self._segments(memory.key_segment.at[slot], score.shape, 1)
            score = jnp.where(query_segment == key_segment, score, softmax.MASKED)
        plgpu.barrier_wait(memory.value_full.at[slot])
        first_missing = place.length - first_key
        pl.when(first_missing < self.key_block)(lambda: self._clear(memory, slot, index, first_missing))
        return softmax.absorb_gpu(self.warpgroup, seen, score, memory.value.at[slot], query.dtype)

    def _segments(self, ref: Any, shape: tuple[int, ...], dimension: int) -> Array:
        """Broadcasts a segment per row (dimension 0) or column (1) of an accumulator to its scores."""
        layout = plgpu.Layout.WGMMA.reduce(1 - dimension)
        return jax.lax.broadcast_in_dim(self.warpgroup.load(ref, layout), shape, [dimension])

    def _clear(self, memory: _Memory, slot: Array, index: Array, first: Array) -> None:
        """Zeros the rows of values from `first` on, which may hold NaN. Warpgroup 0 does it, others wait."""
        value, tile = memory.value.at[slot], 64

        def clear(start: int) -> None:
            row = self.warpgroup.iota((tile,), 0, plgpu.Layout.WGMMA.reduce(1)) + start
            for column in range(0, value.shape[1], tile):
                piece = value.at[pl.ds(start, tile), pl.ds(column, min(tile, value.shape[1] - column))]
                exists = self.warpgroup.rows(row < first, piece.shape)
                piece[...] = jnp.where(exists, self.warpgroup.load(piece), 0).astype(piece.dtype)

        for start in range(0, value.shape[0], tile):
            pl.when((index == 0) & (start + tile > first))(partial(clear, start))
        plgpu.commit_smem()
        if self.num_warpgroups > 1:
            plgpu.barrier_arrive(memory.cleared)
            plgpu.barrier_wait(memory.cleared)
