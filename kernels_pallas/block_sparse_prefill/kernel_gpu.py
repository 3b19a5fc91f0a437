"""Computes block-sparse prefill attention on Hopper GPUs: a ring of key tiles, filled by TMA from the listed blocks.

Grid, the last axis fastest: (B, K, query blocks from the last to the first, tiles of 64 queries of the key-value head's
heads, two by two). So thread blocks that run at the same time share their keys in the L2 cache, and those with the most
keys begin first.

One warpgroup holds two tiles of 64 queries that share a list (one, if there is no second or it does not fit) in shared
memory and their output in registers: with one, the L2 cache's bandwidth would bound the kernel before the matrix unit
does. It loops over the tiles of 64 keys of the list; while one is multiplied, the next is being copied, and the list's
entry of the one after that is being read. Two thread blocks fit on a multiprocessor, so that one's softmax overlaps the
other's products.

Masked blocks at the end of a list are dropped before the first copy; other masked blocks are copied and not multiplied.
Element masks are applied only to partially masked tiles.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas import online_softmax
from decodax.kernels_pallas.block_sparse_prefill.lists import BlockLists
from decodax.kernels_pallas.compat import TILING_ROWS, Warpgroup, aligned_rows, gpu_kernel, tiled
from decodax.kernels_pallas.hopper import miscompiled_reason
from decodax.kernels_pallas.online_softmax import OnlineSoftmax
from decodax.kernels_pallas.selection import every_reason

STAGES = 2  # tiles in the ring
_BLOCK_BYTES = 113 * 2**10  # half of a multiprocessor's 227 KiB of shared memory (H100, CUDA programming guide)
TILE = 64  # queries, and keys: what one warpgroup multiplies


@every_reason
def unsupported_reason(
    query: Any, key: Any, value: Any, blocks: BlockLists, *, interpret: bool
) -> Iterator[str | None]:
    """Every reason why this kernel does not support these operands (arrays or shapes)."""
    dtypes = (jnp.bfloat16, jnp.float16, jnp.float32) if interpret else (jnp.bfloat16, jnp.float16)
    if query.dtype not in dtypes:
        yield f"the GPU kernel takes bfloat16 and float16, got {query.dtype}"
    for name, size in (("query", blocks.query_block), ("key", blocks.key_block)):
        if size % TILE:
            yield f"the GPU kernel takes {name} blocks of a multiple of {TILE} tokens, got {size}"
    for name, size in (("keys", key.shape[3]), ("values", value.shape[3])):
        if size % 16 or size > 256:
            yield f"the GPU kernel takes {name} of a multiple of 16 numbers up to 256, got {size}"
    if key.shape[2] < TILE or key.shape[2] % TILING_ROWS:
        yield (
            f"the GPU kernel takes keys with room for a multiple of {TILING_ROWS} tokens from {TILE} on, got "
            f"{key.shape[2]}"
        )
    yield None if interpret else miscompiled_reason()


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
    num_kv_heads, capacity, value_size = value.shape[1:]
    num_lists = blocks.index.shape[1]
    padded_tokens = blocks.num_query_blocks * blocks.query_block
    padded = jnp.pad(query, ((0, 0), (0, padded_tokens - num_tokens), (0, 0), (0, 0)))
    tiles, heads_per_list = blocks.query_block // TILE, num_heads // num_lists
    together = _tiles_together(heads_per_list * tiles, head_size, value_size)
    sizes = _Sizes(
        num_blocks=blocks.num_query_blocks,
        query_block=blocks.query_block,
        key_block=blocks.key_block,
        tiles=tiles,
        together=together,
        group=num_heads // num_kv_heads,
        heads_per_list=heads_per_list,
        capacity=capacity,
    )
    warpgroup = Warpgroup(interpret)

    def block_sparse_prefill(*refs: Any) -> None:
        _read_list(warpgroup, _Refs(*refs), sizes, scale, softcap)

    output, lse = gpu_kernel(
        block_sparse_prefill,
        (
            jax.ShapeDtypeStruct((batch, padded_tokens, num_heads, value_size), query.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, padded_tokens), jnp.float32),
        ),
        grid=(batch, num_kv_heads, blocks.num_query_blocks, sizes.group * tiles // together),
        grid_names=("row", "kv_head", "block", "member"),
        scratch_types=[
            plgpu.SMEM((together, TILE, head_size), query.dtype, transforms=tiled(head_size, query.dtype)),
            plgpu.Barrier(num_arrivals=together),
        ],
        interpret=interpret,
    )(offset, length, blocks.start, blocks.index, padded, key, value)
    return output[:, :num_tokens], lse.transpose(0, 2, 1)[:, :num_tokens]


def _tiles_together(num_tiles: int, head_size: int, value_size: int) -> int:
    """Tiles of queries in a thread block: two if the registers hold two outputs and two blocks fit a multiprocessor."""
    shared_memory = 2 * TILE * (2 * head_size + STAGES * (head_size + value_size))
    return 2 if num_tiles % 2 == 0 and value_size <= 128 and shared_memory <= _BLOCK_BYTES else 1


class _Sizes(NamedTuple):
    """What is known when compiling."""

    num_blocks: int  # of queries
    query_block: int
    key_block: int
    tiles: int  # of a query block
    together: int  # tiles of queries that a warpgroup holds
    group: int  # query heads of a key-value head
    heads_per_list: int
    capacity: int


class _Refs(NamedTuple):
    offset: Any  # [B], and all that follows up to `lse`, in global memory
    length: Any
    start: Any  # [B, lists, query blocks + 1]
    index: Any  # [B, lists, M]
    query: Any  # [B, T, N, H]
    key: Any  # [B, K, S, H]
    value: Any
    output: Any  # [B, T, N, I]
    lse: Any  # [B, N, T]
    queries: Any  # [tiles, 64, H] in shared memory
    query_barrier: Any


class _Queries(NamedTuple):
    """A tile of 64 queries."""

    head: Any
    first_token: Any
    first_slot: Any  # of the first query
    limit: Any  # no query attends to this slot or a later one


class _Walk(NamedTuple):
    """The tiles of keys of a thread block."""

    row: Any
    kv_head: Any
    list: Any
    tiles: tuple[_Queries, ...]
    limit: Any  # of all its queries
    start: Any  # of the list
    count: Any  # of tiles of keys


class _Copied(NamedTuple):
    """A tile of keys in shared memory."""

    first_slot: Any  # of those to attend to
    copied_from: Any  # slot of the first one here, which is earlier if the last tile does not fit
    keys: Any  # [64, H]
    values: Any  # [64, I]


def _read_list(warpgroup: Warpgroup, refs: _Refs, sizes: _Sizes, scale: float, softcap: float | None) -> None:
    walk = _walk(refs, sizes)
    for tile, queries in enumerate(walk.tiles):
        tokens = aligned_rows(queries.first_token, TILE)
        source = refs.query.at[walk.row, tokens, queries.head]
        plgpu.copy_gmem_to_smem(source, refs.queries.at[tile], refs.query_barrier)
    dtype, head_size, value_size = refs.key.dtype, refs.key.shape[3], refs.value.shape[3]

    def read(keys: Any, values: Any, barrier: Any) -> tuple[OnlineSoftmax, ...]:
        return _read_tiles(warpgroup, refs, sizes, walk, keys, values, barrier, scale, softcap)

    seen = pl.run_scoped(
        read,
        plgpu.SMEM((STAGES, TILE, head_size), dtype, transforms=tiled(head_size, dtype)),
        plgpu.SMEM((STAGES, TILE, value_size), dtype, transforms=tiled(value_size, dtype)),
        plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    )

    def write(output: Any, lse: Any) -> None:
        for tile, of_tile in enumerate(seen):
            mixed, log_sum_exp = online_softmax.finish_gpu(warpgroup, of_tile)
            output[tile] = mixed.astype(output.dtype)
            lse[tile] = log_sum_exp
        plgpu.commit_smem()
        for tile, queries in enumerate(walk.tiles):
            tokens = aligned_rows(queries.first_token, TILE)
            plgpu.copy_smem_to_gmem(output.at[tile], refs.output.at[walk.row, tokens, queries.head])
            plgpu.copy_smem_to_gmem(lse.at[tile], refs.lse.at[walk.row, queries.head, tokens])
        plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(
        write,
        plgpu.SMEM((sizes.together, TILE, value_size), dtype, transforms=tiled(value_size, dtype)),
        plgpu.SMEM((sizes.together, TILE), jnp.float32),
    )


def _walk(refs: _Refs, sizes: _Sizes) -> _Walk:
    row, kv_head = jax.lax.axis_index("row"), jax.lax.axis_index("kv_head")
    block = sizes.num_blocks - 1 - jax.lax.axis_index("block")
    first_tile = jax.lax.axis_index("member") * sizes.together
    length = refs.length[row]

    def queries(tile: Any) -> _Queries:
        head = kv_head * sizes.group + jax.lax.div(tile, sizes.tiles)
        first_token = block * sizes.query_block + jax.lax.rem(tile, sizes.tiles) * TILE
        first_slot = refs.offset[row] + first_token
        return _Queries(head, first_token, first_slot, jnp.minimum(length, first_slot + TILE))

    tiles = tuple(queries(first_tile + tile) for tile in range(sizes.together))
    limit = functools.reduce(jnp.maximum, (tile.limit for tile in tiles))
    list_ = jax.lax.div(tiles[0].head, sizes.heads_per_list)
    start, end = refs.start[row, list_, block], refs.start[row, list_, block + 1]

    def is_unread(end: Any) -> Any:
        last = refs.index[row, list_, jnp.maximum(end - 1, 0)] * sizes.key_block
        return (end > start) & (last >= limit)

    end = jax.lax.while_loop(is_unread, lambda end: end - 1, end)
    count = jnp.maximum(end - start, 0) * (sizes.key_block // TILE)
    return _Walk(row, kv_head, list_, tiles, limit, start, count)


def _read_tiles(
    warpgroup: Warpgroup,
    refs: _Refs,
    sizes: _Sizes,
    walk: _Walk,
    keys: Any,
    values: Any,
    barrier: Any,
    scale: float,
    softcap: float | None,
) -> tuple[OnlineSoftmax, ...]:
    """The softmax of the queries over all their tiles. The ring: keys and values [STAGES, 64, ...] and barriers."""
    tiles_per_block = sizes.key_block // TILE

    def first_slot(tile: Any) -> Any:
        """The first slot of a tile of the list; after its end, of its last tile."""
        tile = jnp.clip(tile, 0, jnp.maximum(walk.count - 1, 0))
        entry = jnp.minimum(walk.start + jax.lax.div(tile, tiles_per_block), refs.index.shape[2] - 1)
        listed = refs.index[walk.row, walk.list, entry]
        return listed * sizes.key_block + jax.lax.rem(tile, tiles_per_block) * TILE

    def copy(slot: Any, place: Any) -> None:
        """Copies a tile; one that does not fit starts earlier, to end with the last slot."""
        slots = (walk.row, walk.kv_head, aligned_rows(jnp.minimum(slot, sizes.capacity - TILE), TILE))
        plgpu.copy_gmem_to_smem(refs.key.at[slots], keys.at[place], barrier.at[place])
        plgpu.copy_gmem_to_smem(refs.value.at[slots], values.at[place], barrier.at[place])

    slots = tuple(first_slot(jnp.int32(tile)) for tile in range(STAGES + 1))
    for place in range(STAGES):
        pl.when(place < walk.count)(lambda place=place: copy(slots[place], place))

    def step(tile: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        seen, (slot, *following) = carry
        place = jax.lax.rem(tile, STAGES)
        entering = first_slot(tile + STAGES + 1)  # used a step later, so that nothing waits for it
        plgpu.barrier_wait(barrier.at[place])
        copied_from = jnp.minimum(slot, sizes.capacity - TILE)
        copied = _Copied(slot, copied_from, keys.at[place], values.at[place])
        _clean(warpgroup, copied, walk.limit)
        seen = tuple(
            _absorb_tile(warpgroup, queries, refs.queries.at[number], before, copied, scale, softcap)
            for number, (queries, before) in enumerate(zip(walk.tiles, seen, strict=True))
        )
        pl.when(tile + STAGES < walk.count)(lambda: copy(following[-1], place))
        return seen, (*following, entering)

    nothing = online_softmax.empty_softmax_gpu(warpgroup, TILE, refs.value.shape[3])
    plgpu.barrier_wait(refs.query_barrier)
    seen, _ = jax.lax.fori_loop(0, walk.count, step, ((nothing,) * sizes.together, slots))
    return seen


def _clean(warpgroup: Warpgroup, copied: _Copied, limit: Any) -> None:
    """Zeros masked values: they may hold anything, and 0 x NaN is NaN."""

    @pl.when((copied.copied_from < copied.first_slot) | (copied.copied_from + TILE > limit))
    def _() -> None:
        slot = copied.copied_from + warpgroup.iota(copied.values.shape, 0)
        value = warpgroup.load(copied.values)
        is_read = (slot >= copied.first_slot) & (slot < limit)
        copied.values[...] = jnp.where(is_read, value, jnp.zeros_like(value))
        plgpu.commit_smem()


def _absorb_tile(
    warpgroup: Warpgroup,
    queries: _Queries,
    query: Any,
    seen: OnlineSoftmax,
    copied: _Copied,
    scale: float,
    softcap: float | None,
) -> OnlineSoftmax:
    """Adds a tile of keys to the softmax of the queries ([64, H] in shared memory)."""

    def masked(score: jax.Array) -> jax.Array:
        slot = copied.copied_from + warpgroup.iota(score.shape, 1)
        at = queries.first_slot + warpgroup.iota(score.shape, 0)
        allowed = (slot >= copied.first_slot) & (slot <= at) & (slot < queries.limit)
        return jnp.where(allowed, score, online_softmax.MASKED)

    def absorbed(seen: OnlineSoftmax) -> OnlineSoftmax:
        # The scale of quantised keys and values would be applied to what is in shared memory here.
        score = online_softmax.capped(warpgroup.dot(query, copied.keys, transpose_right=True), scale, softcap)
        is_unmasked = copied.first_slot + TILE <= jnp.minimum(queries.first_slot + 1, queries.limit)
        score = jax.lax.cond(is_unmasked, lambda score: score, masked, score)
        return online_softmax.absorb_gpu(warpgroup, seen, score, copied.values, copied.values.dtype)

    return jax.lax.cond(copied.first_slot < queries.limit, absorbed, lambda seen: seen, seen)
