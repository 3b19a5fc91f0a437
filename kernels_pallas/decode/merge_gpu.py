"""Merges partial softmaxes by their log-sum-exps with the new tokens and the sinks: the second GPU decode kernel.

    grid: owners (row, key-value head, group of packed queries) x blocks of 64 packed queries x pieces of output columns

An owner's partial softmaxes are adjacent and prefetched (TMA). New tokens are read like a cache's tile; a bit per token
says which of them a query attends to. LeanAttention (arXiv 2405.10480) merges in the same way, within one kernel.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from decodax.kernels_pallas.compat import Warpgroup, gpu_kernel
from decodax.kernels_pallas.decode.new_tokens import NewTokens
from decodax.kernels_pallas.decode.partition import Partition
from decodax.kernels_pallas.decode.queries_gpu import BLOCK_QUERIES, ROW, Sizes, shared
from decodax.kernels_pallas.hopper import PROGRAM_SHARED_BYTES
from decodax.kernels_pallas.online_softmax import (
    LOG2E,
    MASKED,
    OnlineSoftmax,
    absorb_gpu,
    capped,
    empty_softmax_gpu,
    finish_gpu,
)
from decodax.kernels_pallas.padding import WORD_BITS, bit_words

_CHUNK_TOKENS = (16, 32, 64)  # new tokens per step: what a wgmma can sum over
_MAX_STAGES = 4


@dataclass(frozen=True)
class _Memory:
    """The memory of a program; `new` and `sinks` are empty if there are none."""

    first_partial: Any
    num_partials: Any
    query: Any
    partial: Any
    partial_lse: Any
    output: Any
    lse: Any
    partial_shared: Any
    output_shared: Any
    partial_arrived: Any
    new: tuple[Any, ...]
    sinks: tuple[Any, ...]
    new_shared: tuple[Any, ...]


@dataclass(frozen=True)
class Merge:
    """The kernel, with what is known when compiling."""

    sizes: Sizes
    num_kv_heads: int
    scale: float
    softcap: float | None
    warpgroup: Warpgroup

    def __call__(
        self,
        name: str,
        query: jax.Array,
        partials: tuple[jax.Array, jax.Array],
        split: Partition,
        new: NewTokens | None,
        sink_logits: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Output [owners, blocks, block_rows, I] and log-sum-exp [owners, blocks, 64].

        name: of the kernel.
        query: [owners, blocks, block_rows, H].
        partials: outputs [slots, blocks, block_rows, I] and log-sum-exps [slots, blocks, 64].
        split: the runs.
        new: tokens that are not in the cache.
        sink_logits: learned sinks.
        """
        sizes, dtype = self.sizes, query.dtype
        num_owners, num_blocks = query.shape[:2]
        new_operands = () if new is None else self._new_operands(new)
        sinks = () if sink_logits is None else (self._sink_rows(sink_logits),)
        num_stages = self._num_stages(pl.cdiv(partials[0].shape[0], num_owners), dtype.itemsize, new_operands)

        def body(*refs: Any) -> None:
            operands, refs = refs[:5], refs[5:]
            new_refs, refs = refs[: len(new_operands)], refs[len(new_operands) :]
            sink_refs, refs = refs[: len(sinks)], refs[len(sinks) :]
            written_and_shared, new_shared = refs[:5], refs[5:]
            memory = _Memory(*operands, *written_and_shared, new=new_refs, sinks=sink_refs, new_shared=new_shared)
            self._merge_owner(memory, num_stages)

        body.__name__ = f"{name}_merge"
        kernel = gpu_kernel(
            body,
            (
                jax.ShapeDtypeStruct((num_owners, num_blocks, sizes.block_rows, sizes.value_size), dtype),
                jax.ShapeDtypeStruct((num_owners, num_blocks, BLOCK_QUERIES), jnp.float32),
            ),
            grid=(num_owners, num_blocks, sizes.value_size // sizes.merge_columns),
            grid_names=("owner", "block", "columns"),
            scratch_types=[
                shared((num_stages, BLOCK_QUERIES, sizes.merge_columns), jnp.float32),
                shared((BLOCK_QUERIES, sizes.merge_columns), dtype),
                plgpu.Barrier(num_barriers=num_stages),
                *self._new_scratch(dtype, new_operands),
            ],
            interpret=self.warpgroup.interpret,
        )
        return kernel(split.first_partial, split.num_partials, query, *partials, *new_operands, *sinks)

    def _merge_owner(self, memory: _Memory, num_stages: int) -> None:
        warpgroup, sizes = self.warpgroup, self.sizes
        owner, block = jax.lax.axis_index("owner"), jax.lax.axis_index("block")
        columns = pl.ds(jax.lax.axis_index("columns") * sizes.merge_columns, sizes.merge_columns)
        rows = pl.ds(0, sizes.block_rows)
        slab = jax.lax.div(owner, jnp.int32(sizes.num_groups))
        row_block = jax.lax.rem(owner, jnp.int32(sizes.num_groups)) * sizes.num_blocks + block
        count, first = memory.num_partials[owner], memory.first_partial[owner]

        def fetch(partial: jax.Array) -> None:
            stage = jax.lax.rem(partial, jnp.int32(num_stages))

            @pl.when(partial < count)
            def _():
                source = memory.partial.at[first + partial, block, rows, columns]
                plgpu.copy_gmem_to_smem(source, memory.partial_shared.at[stage, rows], memory.partial_arrived.at[stage])

        for i in range(num_stages):
            fetch(jnp.int32(i))
        seen = empty_softmax_gpu(warpgroup, BLOCK_QUERIES, sizes.merge_columns)
        if memory.new:
            query = memory.query.at[owner, block]
            seen = self._read_new(memory, seen, query, slab, row_block, columns)

        def step(partial: jax.Array, seen: OnlineSoftmax) -> OnlineSoftmax:
            stage = jax.lax.rem(partial, jnp.int32(num_stages))
            score = warpgroup.load(memory.partial_lse.at[first + partial, block], ROW, is_shared=False) * LOG2E
            plgpu.barrier_wait(memory.partial_arrived.at[stage])
            seen = self._merged(seen, score, warpgroup.load(memory.partial_shared.at[stage]))
            fetch(partial + num_stages)
            return seen

        seen = jax.lax.fori_loop(0, count, step, seen)
        for sinks in memory.sinks:
            head = jax.lax.rem(slab, jnp.int32(self.num_kv_heads))
            seen = self._merged(seen, warpgroup.load(sinks.at[head, row_block], ROW, is_shared=False) * LOG2E, None)
        output, lse = finish_gpu(warpgroup, seen)
        memory.output_shared[...] = output.astype(memory.output.dtype)
        memory.lse[owner, block] = lse  # the same from the programs of all columns
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory.output_shared.at[rows], memory.output.at[owner, block, rows, columns])
        plgpu.wait_smem_to_gmem(0)

    def _merged(self, seen: OnlineSoftmax, score: jax.Array, output: jax.Array | None) -> OnlineSoftmax:
        """`seen` merged with a partial softmax of this log-sum-exp (in units of log 2) and output (None: zero)."""
        score = jnp.maximum(score, MASKED)
        maximum = jnp.maximum(seen.maximum, score)
        decay, weight = jnp.exp2(seen.maximum - maximum), jnp.exp2(score - maximum)
        mixed = seen.output * self.warpgroup.rows(decay, seen.output.shape)
        if output is not None:
            mixed = mixed + output * self.warpgroup.rows(weight, output.shape)
        return OnlineSoftmax(maximum, seen.total * decay + weight, mixed)

    def _read_new(
        self, memory: _Memory, seen: OnlineSoftmax, query: Any, slab: jax.Array, row_block: jax.Array, columns: Any
    ) -> OnlineSoftmax:
        """Attention over the new tokens, in chunks of at most 64."""
        warpgroup = self.warpgroup
        key, value, words = memory.new
        query_shared, key_shared, value_shared, query_arrived, new_arrived = memory.new_shared
        row = jax.lax.div(slab, jnp.int32(self.num_kv_heads))
        plgpu.copy_gmem_to_smem(query, query_shared.at[pl.ds(0, self.sizes.block_rows)], query_arrived)
        _, num_chunks, chunk_tokens, _ = key.shape
        shape = (BLOCK_QUERIES, chunk_tokens)
        token = warpgroup.iota(shape, 1)
        for i in range(num_chunks):
            plgpu.copy_gmem_to_smem(key.at[slab, i], key_shared, new_arrived)
            plgpu.copy_gmem_to_smem(value.at[slab, i, pl.ds(0, chunk_tokens), columns], value_shared, new_arrived)
            first_word = i * pl.cdiv(chunk_tokens, WORD_BITS)
            word = warpgroup.rows(warpgroup.load(words.at[row, first_word, row_block], ROW, is_shared=False), shape)
            if chunk_tokens > WORD_BITS:
                second = warpgroup.rows(
                    warpgroup.load(words.at[row, first_word + 1, row_block], ROW, is_shared=False), shape
                )
                word = jnp.where(token < WORD_BITS, word, second)
            bit = jnp.bitwise_and(jax.lax.shift_right_logical(word, jnp.bitwise_and(token, WORD_BITS - 1)), 1)
            if i == 0:
                plgpu.barrier_wait(query_arrived)
            plgpu.barrier_wait(new_arrived)
            score = warpgroup.dot(query_shared, key_shared, transpose_right=True)
            score = jnp.where(bit != 0, capped(score, self.scale, self.softcap), MASKED)
            seen = absorb_gpu(warpgroup, seen, score, value_shared, value_shared.dtype)
        return seen

    def _new_operands(self, new: NewTokens) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Keys and values [B x K, chunks, tokens, H or I]; a bit per token for each packed query, [B, words, .., 64].

        Values that no query attends to become zero: a weight of 0 does not cancel what is not finite.
        """
        num_new = new.allowed.shape[2]
        chunk_tokens = next((tokens for tokens in _CHUNK_TOKENS if num_new <= tokens), _CHUNK_TOKENS[-1])
        num_chunks = pl.cdiv(num_new, chunk_tokens)
        num_words = num_chunks * pl.cdiv(chunk_tokens, WORD_BITS)
        is_read = jnp.any(new.allowed, axis=1)[:, None, :, None]

        def chunks(rows: jax.Array) -> jax.Array:
            padded = jnp.pad(rows, [(0, 0), (0, 0), (0, num_chunks * chunk_tokens - num_new), (0, 0)])
            return padded.reshape(-1, num_chunks, chunk_tokens, rows.shape[-1])

        words = bit_words(new.allowed, num_words)
        rows = jnp.stack([self.sizes.pack_rows(words[:, :, i]) for i in range(num_words)], axis=1)
        return chunks(new.key), chunks(jnp.where(is_read, new.value, jnp.zeros_like(new.value))), rows

    def _sink_rows(self, sink_logits: jax.Array) -> jax.Array:
        """[N] as [K, groups x blocks, 64]."""
        sizes = self.sizes
        logits = sink_logits.astype(jnp.float32).reshape(1, 1, self.num_kv_heads, sizes.group)
        logits = jnp.broadcast_to(logits, (1, sizes.num_queries, self.num_kv_heads, sizes.group))
        packed = sizes.pack(logits)[0].reshape(self.num_kv_heads, -1, sizes.block_rows)
        return jnp.pad(packed, [(0, 0), (0, 0), (0, BLOCK_QUERIES - sizes.block_rows)])

    def _new_scratch(self, dtype: Any, new_operands: tuple[jax.Array, ...]) -> list[Any]:
        if not new_operands:
            return []
        chunk_tokens, sizes = new_operands[0].shape[2], self.sizes
        return [
            shared((BLOCK_QUERIES, sizes.head_size), dtype),
            shared((chunk_tokens, sizes.head_size), dtype),
            shared((chunk_tokens, sizes.merge_columns), dtype, most_columns=chunk_tokens),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2),
        ]

    def _num_stages(self, expected_partials: int, item_bytes: int, new_operands: tuple[jax.Array, ...]) -> int:
        """Partial softmaxes in flight: no more than an owner has if all are equal, plus one for its borders."""
        sizes = self.sizes
        used = BLOCK_QUERIES * sizes.merge_columns * item_bytes
        if new_operands:
            chunk_tokens = new_operands[0].shape[2]
            used += (BLOCK_QUERIES + chunk_tokens) * sizes.head_size * item_bytes
            used += chunk_tokens * sizes.merge_columns * item_bytes
        room = (PROGRAM_SHARED_BYTES - 4_096 - used) // (BLOCK_QUERIES * sizes.merge_columns * 4)
        return min(_MAX_STAGES, expected_partials + 1, room)
