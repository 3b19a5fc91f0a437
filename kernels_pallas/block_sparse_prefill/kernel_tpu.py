"""Computes block-sparse prefill attention on TPU: one stream of key blocks, copied ahead of the one being multiplied.

Grid: (B, head groups, query blocks), one after the other on the core; a head group is the heads that share a list, or
as many of them as fit.

    queries of the heads that share a list, concatenated             [rows, H]  in VMEM
    list of the program and of the next one      HBM -> SMEM, a program ahead   [2, list rows, 1, 128]
    listed blocks of keys and values             HBM -> VMEM, STAGES - 1 ahead  [STAGES, key block, H | I]

The stream does not stop at the end of a program: while its last blocks are multiplied, the first ones of the next
program's list are already being copied. A masked block (above the diagonal, or after the row's length) is neither
copied nor multiplied; element masks are applied only to partially masked blocks.

Heads whose size is no multiple of 128: XLA keeps such keys and values with the tokens in lanes, [B, K, H, S] in memory,
so that nothing is padded. They are copied in this layout if blocks and capacity are multiples of 128; otherwise XLA
transposes all of them for this kernel, once per call.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas import online_softmax
from decodax.kernels_pallas.block_sparse_prefill.lists import BlockLists
from decodax.kernels_pallas.compat import tpu_interpreter
from decodax.kernels_pallas.online_softmax import OnlineSoftmax
from decodax.kernels_pallas.selection import every_reason

STAGES = 3  # blocks of keys in VMEM: one that is multiplied, the others being copied
MAX_ROWS = 1024  # queries x heads of a program
_VMEM_BYTES = 32 * 2**20  # of 128 MiB on v5e and v6e
_LANES = 128
_ALIGNMENT = 8  # slots: the tiles of a cache in HBM


@every_reason
def unsupported_reason(query: Any, key: Any, value: Any, blocks: BlockLists) -> Iterator[str | None]:
    """Every reason why this kernel does not support these operands (arrays or shapes)."""
    capacity, head_size = key.shape[2:]
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        yield f"the TPU kernel takes float32 and bfloat16, got {query.dtype}"
    for name, size in (("query", blocks.query_block), ("key", blocks.key_block)):
        if size not in (64, 128, 256):
            yield f"the TPU kernel takes {name} blocks of 64, 128 or 256 tokens, got {size}"
    if capacity % _ALIGNMENT or capacity < blocks.key_block:
        yield (
            f"the TPU kernel takes keys with room for a multiple of {_ALIGNMENT} tokens and at least one block of "
            f"{blocks.key_block}, got {capacity}"
        )
    if max(head_size, value.shape[3]) > 256:
        yield f"the TPU kernel takes heads of at most 256 numbers, got {head_size} and {value.shape[3]}"


def block_sparse_prefill(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S I"],
    blocks: BlockLists,
    *,
    scale: float,
    offset: Int[Array, " B"],
    length: Int[Array, " B"],
    softcap: float | None,
    interpret: bool,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B T N"]]:
    batch, num_tokens, num_heads, head_size = query.shape
    value_size = value.shape[3]
    sizes = _Sizes.of(query, key, value, blocks)
    heads, num_groups, num_blocks, query_block = sizes.heads, sizes.num_groups, sizes.num_blocks, sizes.query_block
    rows = heads * query_block
    padded = jnp.pad(query, ((0, 0), (0, num_blocks * query_block - num_tokens), (0, 0), (0, 0)))
    by_group = padded.transpose(0, 2, 1, 3).reshape(batch, num_groups, heads, -1, head_size)
    index = jnp.pad(blocks.index, ((0, 0), (0, 0), (0, -blocks.index.shape[2] % _LANES)))
    index = index.reshape(*index.shape[:2], -1, 1, _LANES)
    start = blocks.start[:, :, None, :]
    key = key.swapaxes(2, 3) if sizes.keys_in_lanes else key
    value = value.swapaxes(2, 3) if sizes.values_in_lanes else value

    def body(*refs: Any) -> None:
        _program(_Refs(*refs), sizes, scale, softcap)

    def this_start(row: Any, group: Any, block: Any, *_: Any) -> tuple[Any, ...]:
        return row, _div(group, sizes.groups_per_list), 0, 0

    def next_start(row: Any, group: Any, block: Any, *_: Any) -> tuple[Any, ...]:
        row, group, _block = _next(sizes, row, group, block)
        return jnp.minimum(row, batch - 1), _div(group, sizes.groups_per_list), 0, 0

    def starts(index_map: Any) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, 1, num_blocks + 1), index_map, memory_space=pltpu.SMEM)

    def tokens(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, heads, query_block, size), lambda row, group, block, *_: (row, group, 0, block, 0))

    def stream(size: int, in_lanes: bool) -> Any:
        block = (size, sizes.key_block) if in_lanes else (sizes.key_block, size)
        return pltpu.VMEM((STAGES, *block), key.dtype)

    output, lse = pl.pallas_call(
        body,
        name="block_sparse_prefill",
        out_shape=(
            jax.ShapeDtypeStruct((batch, num_groups, heads, num_blocks * query_block, value_size), query.dtype),
            jax.ShapeDtypeStruct((batch, num_groups, num_blocks, 1, rows), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_groups, num_blocks),
            in_specs=[starts(this_start), starts(next_start), tokens(head_size)]
            + [pl.BlockSpec(memory_space=pl.ANY)] * 3,
            out_specs=(
                tokens(value_size),
                pl.BlockSpec((1, 1, 1, 1, rows), lambda row, group, block, *_: (row, group, block, 0, 0)),
            ),
            scratch_shapes=[
                pltpu.SMEM((2, sizes.list_rows, 1, _LANES), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((2,), jnp.int32),
                stream(head_size, sizes.keys_in_lanes),
                stream(value_size, sizes.values_in_lanes),
                pltpu.SemaphoreType.DMA((STAGES, 2)),
                pltpu.VMEM((rows, 1), jnp.float32),
                pltpu.VMEM((rows, 1), jnp.float32),
                pltpu.VMEM((rows, value_size), jnp.float32),
            ],
        ),
        cost_estimate=_cost(query, value, blocks),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 3, vmem_limit_bytes=_VMEM_BYTES),
        interpret=tpu_interpreter(interpret),
    )(offset, length, start, start, by_group, index, key, value)
    output = output.reshape(batch, num_heads, -1, value_size).transpose(0, 2, 1, 3)[:, :num_tokens]
    lse = lse.reshape(batch, num_groups, num_blocks, heads, query_block).transpose(0, 2, 4, 1, 3)
    return output, lse.reshape(batch, -1, num_heads)[:, :num_tokens]


def _cost(query: Array, value: Array, blocks: BlockLists) -> pl.CostEstimate:
    """The cost estimate for the compiler's schedule, as if the lists were full."""
    num_entries = blocks.index.size
    heads_per_list = query.shape[2] // blocks.index.shape[1]
    token = query.shape[3] + value.shape[3]
    scores = num_entries * heads_per_list * blocks.query_block * blocks.key_block
    queries = query.size // query.shape[3]
    num_bytes = query.dtype.itemsize * token * (num_entries * blocks.key_block + queries)
    return pl.CostEstimate(flops=2 * token * scores, bytes_accessed=num_bytes, transcendentals=scores)


def _div(number: Any, divisor: int) -> Any:
    """The quotient of a non-negative number, for which rounding to zero (cheap) is rounding down."""
    return jax.lax.div(number, jnp.full_like(number, divisor))


def _rem(number: Any, divisor: int) -> Any:
    return jax.lax.rem(number, jnp.full_like(number, divisor))


class _Sizes(NamedTuple):
    """What is known when compiling."""

    num_groups: int
    num_blocks: int  # of queries
    heads: int  # of a group
    query_block: int
    key_block: int
    capacity: int
    num_key_blocks: int
    list_rows: int  # of 128 entries, copied per list
    index_rows: int
    groups_per_kv_head: int
    groups_per_list: int
    keys_in_lanes: bool
    values_in_lanes: bool

    @classmethod
    def of(cls, query: Array, key: Array, value: Array, blocks: BlockLists) -> "_Sizes":
        num_heads, num_kv_heads, capacity = query.shape[2], *key.shape[1:3]
        num_lists, num_entries = blocks.index.shape[1:]
        heads = num_heads // num_lists
        while heads * blocks.query_block > MAX_ROWS:
            heads = next(divisor for divisor in range(heads - 1, 0, -1) if heads % divisor == 0)
        num_groups = num_heads // heads
        num_key_blocks = pl.cdiv(capacity, blocks.key_block)
        index_rows = pl.cdiv(num_entries, _LANES)
        may_be_in_lanes = capacity % _LANES == 0 and blocks.key_block % _LANES == 0
        return cls(
            num_groups=num_groups,
            num_blocks=blocks.num_query_blocks,
            heads=heads,
            query_block=blocks.query_block,
            key_block=blocks.key_block,
            capacity=capacity,
            num_key_blocks=num_key_blocks,
            # A list without duplicates begins somewhere in its first row.
            list_rows=min(index_rows, pl.cdiv(num_key_blocks, _LANES) + 1),
            index_rows=index_rows,
            groups_per_kv_head=num_groups // num_kv_heads,
            groups_per_list=num_groups // num_lists,
            keys_in_lanes=may_be_in_lanes and key.shape[3] % _LANES != 0,
            values_in_lanes=may_be_in_lanes and value.shape[3] % _LANES != 0,
        )


class _Refs(NamedTuple):
    offset: Any  # [B] in SMEM
    length: Any
    start: Any  # [1, 1, 1, query blocks + 1] in SMEM: of this program's list, and of the next program's
    next_start: Any
    query: Any  # [1, 1, heads, query block, H]
    index: Any  # [B, lists, rows, 1, 128] in HBM
    key: Any  # [B, K, S, H], or [B, K, H, S], in HBM
    value: Any
    output: Any  # [1, 1, heads, query block, I]
    lse: Any  # [1, 1, 1, 1, heads x query block]
    listed: Any  # [2, list rows, 1, 128] in SMEM: the lists of this program and the next one
    list_semaphore: Any  # [2]
    state: Any  # [2] in SMEM: index in the stream of this program's first block; its half of `listed`
    keys: Any  # [STAGES, key block, H], or [STAGES, H, key block]
    values: Any  # [STAGES, key block, I], or [STAGES, I, key block]
    semaphore: Any  # [STAGES, 2]
    maximum: Any  # [rows, 1]
    total: Any
    mixed: Any  # [rows, I]


def _next(sizes: _Sizes, row: Any, group: Any, block: Any) -> tuple[Any, Any, Any]:
    """The indices of the next program; the row is B after the last one."""
    block = block + 1
    group = group + (block == sizes.num_blocks).astype(jnp.int32)
    block = jnp.where(block == sizes.num_blocks, 0, block)
    row = row + (group == sizes.num_groups).astype(jnp.int32)
    return row, jnp.where(group == sizes.num_groups, 0, group), block


class _List(NamedTuple):
    """The list of one program: where it is, and what its queries attend to."""

    row: Any
    group: Any
    first_query: Any  # slot of its first query
    limit: Any  # no query attends to this slot or a later one
    half: Any  # of `listed`
    start: Any
    count: Any

    @classmethod
    def of(cls, refs: _Refs, sizes: _Sizes, program: tuple[Any, Any, Any], start_ref: Any, half: Any) -> "_List":
        row, group, block = program
        exists = row < refs.offset.shape[0]
        row = jnp.minimum(row, refs.offset.shape[0] - 1)
        first_query = refs.offset[row] + block * sizes.query_block
        limit = jnp.minimum(refs.length[row], first_query + sizes.query_block)
        start, end = start_ref[0, 0, 0, block], start_ref[0, 0, 0, block + 1]
        count = jnp.where(exists, jnp.minimum(end - start, sizes.num_key_blocks), 0)
        return cls(row, group, first_query, limit, half, start, count)

    def copy(self, refs: _Refs, sizes: _Sizes) -> Any:
        """The copy of the list itself."""
        rows = pl.ds(self._first_row(sizes), sizes.list_rows)
        rows = refs.index.at[self.row, _div(self.group, sizes.groups_per_list), rows]
        return pltpu.make_async_copy(rows, refs.listed.at[self.half], refs.list_semaphore.at[self.half])

    def _first_row(self, sizes: _Sizes) -> Any:
        return jnp.minimum(_div(self.start, _LANES), sizes.index_rows - sizes.list_rows)

    def slot(self, refs: _Refs, sizes: _Sizes, entry: Any) -> Any:
        """The first slot of a listed block."""
        place = self.start + entry - self._first_row(sizes) * _LANES
        return refs.listed[self.half, _div(place, _LANES), 0, _rem(place, _LANES)] * sizes.key_block

    def copies(self, refs: _Refs, sizes: _Sizes, slot: Any, stage: Any) -> tuple[Any, Any]:
        """The copies of a block of keys and values; one that does not fit starts earlier, to end with the last slot."""
        kv_head = _div(self.group, sizes.groups_per_kv_head)
        slot = jnp.minimum(slot, sizes.capacity - sizes.key_block)

        def slots(in_lanes: bool) -> tuple[Any, ...]:
            aligned = pl.ds(pl.multiple_of(slot, _LANES if in_lanes else _ALIGNMENT), sizes.key_block)
            return (self.row, kv_head, slice(None), aligned) if in_lanes else (self.row, kv_head, aligned)

        key, value = refs.key.at[slots(sizes.keys_in_lanes)], refs.value.at[slots(sizes.values_in_lanes)]
        return (
            pltpu.make_async_copy(key, refs.keys.at[stage], refs.semaphore.at[stage, 0]),
            pltpu.make_async_copy(value, refs.values.at[stage], refs.semaphore.at[stage, 1]),
        )

    def fetch(self, refs: _Refs, sizes: _Sizes, entry: Any, place: Any) -> None:
        """Starts to copy a listed block to its index in the stream, if it exists and is not masked."""

        @pl.when(entry < self.count)
        def _() -> None:
            slot = self.slot(refs, sizes, entry)

            @pl.when(slot < self.limit)
            def _() -> None:
                for copy in self.copies(refs, sizes, slot, _rem(place, STAGES)):
                    copy.start()


def _program(refs: _Refs, sizes: _Sizes, scale: float, softcap: float | None) -> None:
    program = (pl.program_id(0), pl.program_id(1), pl.program_id(2))
    is_first = (program[0] == 0) & (program[1] == 0) & (program[2] == 0)

    @pl.when(is_first)
    def _() -> None:
        refs.state[0] = 0
        refs.state[1] = 0

    first_place, half = refs.state[0], refs.state[1]
    own = _List.of(refs, sizes, program, refs.start, half)
    following = _List.of(refs, sizes, _next(sizes, *program), refs.next_start, 1 - half)

    @pl.when(is_first)
    def _() -> None:
        own.copy(refs, sizes).start()
        own.copy(refs, sizes).wait()
        for entry in range(STAGES):
            own.fetch(refs, sizes, entry, entry)

    following.copy(refs, sizes).start()
    seen = online_softmax.empty_softmax(*refs.mixed.shape)
    refs.maximum[...], refs.total[...], refs.mixed[...] = seen
    steady = jnp.maximum(own.count - STAGES, 0)

    @pl.loop(0, steady)
    def _(entry: Any) -> None:
        _absorb_entry(refs, sizes, own, entry, first_place, scale, softcap)
        own.fetch(refs, sizes, entry + STAGES, first_place + entry)

    following.copy(refs, sizes).wait()

    @pl.loop(steady, own.count)
    def _(entry: Any) -> None:
        _absorb_entry(refs, sizes, own, entry, first_place, scale, softcap)
        following.fetch(refs, sizes, entry + STAGES - own.count, first_place + entry)

    for entry in range(STAGES):  # of a list shorter than the stream, the indices that it did not use

        @pl.when(entry < STAGES - own.count)
        def _(entry: int = entry) -> None:
            following.fetch(refs, sizes, entry, first_place + own.count + entry)

    refs.state[0] = _rem(first_place + own.count, STAGES)
    refs.state[1] = 1 - half
    output, lse = online_softmax.finish(OnlineSoftmax(refs.maximum[...], refs.total[...], refs.mixed[...]))
    refs.output[0, 0] = output.reshape(refs.output.shape[2:]).astype(refs.output.dtype)
    refs.lse[0, 0, 0] = jnp.broadcast_to(lse, (lse.shape[0], _LANES)).T[:1]


def _absorb_entry(
    refs: _Refs, sizes: _Sizes, own: _List, entry: Any, first_place: Any, scale: float, softcap: float | None
) -> None:
    """Waits for a listed block and adds it to the softmax of the queries, unless it is masked."""
    first_slot = own.slot(refs, sizes, entry)
    stage = _rem(first_place + entry, STAGES)

    @pl.when(first_slot < own.limit)
    def _() -> None:
        for copy in own.copies(refs, sizes, first_slot, stage):
            copy.wait()
        is_unmasked = first_slot + sizes.key_block <= jnp.minimum(own.first_query + 1, own.limit)

        def add(masked: bool) -> None:
            query = refs.query[0, 0].reshape(-1, refs.query.shape[4])
            # The scale of quantised keys and values would be applied to what is read here.
            key, value = refs.keys[stage], refs.values[stage]
            value = value.T if sizes.values_in_lanes else value
            score = jax.lax.dot_general(
                query,
                key,
                (((1,), (0 if sizes.keys_in_lanes else 1,)), ((), ())),
                precision=online_softmax.precision(key.dtype),
                preferred_element_type=jnp.float32,
            )
            score = online_softmax.capped(score, scale, softcap)
            if masked:
                score, value = _masked(sizes, own, first_slot, score, value)
            seen = OnlineSoftmax(refs.maximum[...], refs.total[...], refs.mixed[...])
            refs.maximum[...], refs.total[...], refs.mixed[...] = online_softmax.absorb(seen, score, value)

        pl.when(is_unmasked)(lambda: add(masked=False))
        pl.when(jnp.logical_not(is_unmasked))(lambda: add(masked=True))


def _masked(
    sizes: _Sizes, own: _List, first_slot: Any, score: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sets scores of masked keys to MASKED, and values that no query attends to to zero: 0 x NaN is NaN."""
    copied_from = jnp.minimum(first_slot, sizes.capacity - sizes.key_block)
    slot = copied_from + jax.lax.broadcasted_iota(jnp.int32, score.shape, 1)
    at = own.first_query + _rem(jax.lax.broadcasted_iota(jnp.int32, score.shape, 0), sizes.query_block)
    allowed = (slot >= first_slot) & (slot <= at) & (slot < own.limit)
    value_slot = copied_from + jax.lax.broadcasted_iota(jnp.int32, value.shape, 0)
    is_read = (value_slot >= first_slot) & (value_slot < own.limit)
    return jnp.where(allowed, score, online_softmax.MASKED), jnp.where(is_read, value, jnp.zeros_like(value))
