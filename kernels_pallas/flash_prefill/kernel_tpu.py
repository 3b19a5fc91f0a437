"""Computes prefill attention on TPU, with query blocks in pairs that balance the causal mask.

grid [B, N / heads, pairs of query blocks, steps]

queries |#......   Query block i of a pair comes first, then block n - 1 - i: under a causal mask each pair has the
        |##.....   same number of blocks of keys, so that hardly any step of the grid is idle. A step is one block
        |###....   of keys, read once for a group of query heads whose queries are stacked as rows. The number of
        |#..##..   steps is computed from the lengths at run time; blocks outside lengths, window and diagonal are
        |#...##.   no steps. A step without work requests the block before it again: nothing is loaded.
         keys

If the head size is no multiple of the 128 lanes, XLA keeps tokens in lanes: such keys and values are read as
[B, K, H, S], their layout in memory, so that a cache is not copied.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from decodax.kernels_pallas import compat
from decodax.kernels_pallas import online_softmax as softmax
from decodax.kernels_pallas.flash_prefill.spans import Blocks, Rows, Rules, Segments, blocks_to_read
from decodax.kernels_pallas.selection import every_reason

_LANES = 128
_ROWS = 1024  # of queries (tokens x heads) in a block
_TOKENS = 512  # of queries in a block, at most
_KEYS = 512  # in a block
_MOST_HEADS = 8  # packed at _LANES tokens each
_VMEM_BYTES = 40 * 2**20  # of 128 MiB on v5e and v6e


@every_reason
def unsupported_reason(query: Any, key: Any, value: Any) -> Iterator[str | None]:
    """Every reason why the kernel does not support these operands (arrays or shapes)."""
    dtypes = {jnp.dtype(x.dtype) for x in (query, key, value)}
    if len(dtypes) != 1 or not dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        names = ", ".join(jnp.dtype(x.dtype).name for x in (query, key, value))
        yield f"queries, keys and values must all be float32 or all bfloat16, these are {names}"
    largest = max(query.shape[3], value.shape[3])
    if largest > 256:
        yield f"heads must be no larger than 256, these have {largest}"


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
) -> tuple[Float[Array, "B T N I"], Float[Array, "B T N"]]:
    """See `decodax.kernels_pallas.flash_prefill.flash_prefill`."""
    batch, num_queries, num_heads, head_size = query.shape
    num_kv_heads, num_keys, value_size = value.shape[1:]
    group = num_heads // num_kv_heads
    heads = max(i for i in range(1, _MOST_HEADS + 1) if group % i == 0)
    tokens = min(_TOKENS, _ROWS // heads // _LANES * _LANES, pl.cdiv(num_queries, _LANES) * _LANES)
    key_block = min(_KEYS, num_keys)
    blocks = blocks_to_read(rows, segments, rules, num_queries=num_queries, query_block=tokens, key_block=key_block)
    num_blocks = blocks.num_steps.shape[1]
    padding = num_blocks * tokens - num_queries
    packed = jnp.pad(jnp.swapaxes(query, 1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))
    packed = packed.reshape(batch, num_heads // heads, heads, -1, head_size)

    tables = [x.reshape(-1) for x in blocks]
    scalars = [*tables, *rows] + ([] if sink_logits is None else [sink_logits.astype(jnp.float32)])

    def query_index(row, head, pair, step, *scalars):
        return row, head, 0, _place(scalars, num_blocks, row, pair, step)[0], 0

    def key_index(row, head, pair, step, *scalars):
        return row, jax.lax.div(head, jnp.int32(group // heads)), _key_block(scalars, num_blocks, row, pair, step), 0

    def key_index_in_lanes(*place):
        row, head, block, _ = key_index(*place)
        return row, head, 0, block

    in_specs, operands = [pl.BlockSpec((1, 1, heads, tokens, head_size), query_index)], [packed]
    for rows_of_heads in (key, value):
        size = rows_of_heads.shape[3]
        if _in_lanes(size, num_keys):
            in_specs.append(pl.BlockSpec((1, 1, size, key_block), key_index_in_lanes))
            operands.append(jnp.swapaxes(rows_of_heads, 2, 3))
        else:
            in_specs.append(pl.BlockSpec((1, 1, key_block, size), key_index))
            operands.append(rows_of_heads)
    if segments is not None:
        in_specs += [
            pl.BlockSpec((1, tokens, 1), lambda *i: (i[0], query_index(*i)[3], 0)),
            pl.BlockSpec((1, 1, key_block), lambda *i: (i[0], 0, key_index(*i)[2])),
        ]
        operands += [jnp.pad(segments.query, ((0, 0), (0, padding)))[:, :, None], segments.key[:, None, :]]

    output, lse = pl.pallas_call(
        partial(
            _flash_prefill,
            num_blocks=num_blocks,
            key_block=key_block,
            in_lanes=(_in_lanes(head_size, num_keys), _in_lanes(value_size, num_keys)),
            scale=scale,
            rules=rules,
            softcap=softcap,
            has_segments=segments is not None,
            has_sink_logits=sink_logits is not None,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, num_heads // heads, pl.cdiv(num_blocks, 2), _num_steps(blocks.num_steps)),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((1, 1, heads, tokens, value_size), query_index),
                pl.BlockSpec((1, 1, heads, tokens), lambda *i: query_index(*i)[:4]),
            ],
            scratch_shapes=[
                pltpu.VMEM((heads * tokens, 1), jnp.float32),
                pltpu.VMEM((heads * tokens, 1), jnp.float32),
                pltpu.VMEM((heads * tokens, value_size), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((*packed.shape[:4], value_size), query.dtype),
            jax.ShapeDtypeStruct(packed.shape[:4], jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=compat.tpu_interpreter(interpret),
        name="flash_prefill",
    )(*scalars, *operands)
    output = output.reshape(batch, num_heads, -1, value_size)[:, :, :num_queries]
    return jnp.swapaxes(output, 1, 2), jnp.swapaxes(lse.reshape(batch, num_heads, -1)[:, :, :num_queries], 1, 2)


def _in_lanes(head_size: int, num_keys: int) -> bool:
    return head_size % _LANES != 0 and num_keys % _LANES == 0


def _num_steps(count: Array) -> Array:
    """Steps of the longest pair of query blocks. Each block has at least one step, which writes it."""
    count = jnp.maximum(count, 1)
    num_blocks = count.shape[1]
    half = pl.cdiv(num_blocks, 2)
    first, second = count[:, :half], jnp.flip(count, 1)[:, :half]
    is_middle = jnp.arange(half)[None, :] == num_blocks - 1 - jnp.arange(half)[None, :]
    return jnp.max(first + jnp.where(is_middle, 0, second))


def _place(scalars: Any, num_blocks: int, row: Any, pair: Any, step: Any) -> tuple[Any, Any, Any]:
    """For a step of the grid: the block of queries, the index among its blocks of keys, and their number."""
    count = scalars[0]
    partner = num_blocks - 1 - pair
    num_first = jnp.maximum(count[row * num_blocks + pair], 1)
    is_first = (step < num_first) | (pair == partner)
    block = jnp.where(is_first, pair, partner)
    return block, jnp.where(is_first, step, step - num_first), count[row * num_blocks + block]


def _key_block(scalars: Any, num_blocks: int, row: Any, pair: Any, step: Any) -> Any:
    _, num_sink_blocks, skipped, *_ = scalars
    block, index, count = _place(scalars, num_blocks, row, pair, step)
    index = jnp.minimum(index, jnp.maximum(count - 1, 0))
    at = row * num_blocks + block
    return jnp.where(count == 0, 0, Blocks.at(index, num_sink_blocks[at], skipped[at]))


def _flash_prefill(
    *refs: Any,
    num_blocks: int,
    key_block: int,
    in_lanes: tuple[bool, bool],
    scale: float,
    rules: Rules,
    softcap: float | None,
    has_segments: bool,
    has_sink_logits: bool,
) -> None:
    num_scalars = 6 + has_sink_logits
    scalars, refs = refs[:num_scalars], refs[num_scalars:]
    query_ref, key_ref, value_ref = refs[:3]
    segment_refs = refs[3:5] if has_segments else None
    output_ref, lse_ref, *seen_refs = refs[3 + 2 * has_segments :]
    row, head, pair, step = (pl.program_id(axis) for axis in range(4))
    block, index, count = _place(scalars, num_blocks, row, pair, step)
    offset, length, num_sink_tokens = (scalars[i][row] for i in (3, 4, 5))
    heads, tokens, head_size = query_ref.shape[2:]
    num_rows = heads * tokens
    first_query = offset + block * tokens
    first_key = _key_block(scalars, num_blocks, row, pair, step) * key_block

    @pl.when(index == 0)
    def start() -> None:
        seen = softmax.empty_softmax(num_rows, seen_refs[2].shape[1])
        if has_sink_logits:
            logits = [jnp.full((tokens, 1), scalars[6][head * heads + i] * softmax.LOG2E) for i in range(heads)]
            seen = seen._replace(maximum=jnp.concatenate(logits), total=seen.total + 1)
        for ref, initial in zip(seen_refs, seen, strict=True):
            ref[...] = initial

    def absorb(is_masked: bool) -> None:
        query = query_ref[0, 0].reshape(num_rows, head_size)
        value = value_ref[0, 0].T if in_lanes[1] else value_ref[0, 0]
        score = jax.lax.dot_general(
            query,
            key_ref[0, 0],
            (((1,), (0 if in_lanes[0] else 1,)), ((), ())),
            precision=softmax.precision(query.dtype),
            preferred_element_type=jnp.float32,
        )
        score = softmax.capped(score, scale, softcap)
        if is_masked:
            shape = (heads, tokens, key_block)
            query_index = (jax.lax.broadcasted_iota(jnp.int32, shape, 1) + first_query).reshape(score.shape)
            key_index = jax.lax.broadcasted_iota(jnp.int32, score.shape, 1) + first_key
            allowed = rules.read(query_index, key_index, length, num_sink_tokens)
            if segment_refs is not None:
                query_segment = jnp.broadcast_to(segment_refs[0][...], shape).reshape(score.shape)
                allowed = allowed & (query_segment == jnp.broadcast_to(segment_refs[1][0], score.shape))
            score = jnp.where(allowed, score, softmax.MASKED)
            exists = jax.lax.broadcasted_iota(jnp.int32, value.shape, 0) + first_key < length
            value = jnp.where(exists, value.astype(jnp.float32), 0.0).astype(value.dtype)
        seen = softmax.absorb(softmax.OnlineSoftmax(*(ref[...] for ref in seen_refs)), score, value)
        for ref, updated in zip(seen_refs, seen, strict=True):
            ref[...] = updated

    is_unmasked = rules.read_all(
        (first_query, first_query + tokens - 1), (first_key, first_key + key_block - 1), length
    ) & (not has_segments)
    pl.when((index < count) & is_unmasked)(partial(absorb, False))
    pl.when((index < count) & ~is_unmasked)(partial(absorb, True))

    @pl.when(index == jnp.maximum(count - 1, 0))
    def write() -> None:
        output, lse = softmax.finish(softmax.OnlineSoftmax(*(ref[...] for ref in seen_refs)))
        output_ref[0, 0] = output.reshape(heads, tokens, -1).astype(output_ref.dtype)
        # A column becomes a row: the transpose of a tile of equal columns.
        lse_row = jnp.broadcast_to(lse, (num_rows, _LANES)).T[:1]
        for i in range(heads):
            lse_ref[0, 0, i : i + 1] = lse_row[:, i * tokens : (i + 1) * tokens]
