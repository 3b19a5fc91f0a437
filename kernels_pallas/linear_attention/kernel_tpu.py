"""Computes linear attention with decay on TPU (Mosaic): chunks of 64 tokens in sequence, the state in VMEM.

Grid (B, N, blocks of up to 256 tokens), the last axis sequential; the state is the output block that all steps of a
(row, head) share:

              block 0          block 1          block 2 (length ends in it)    block 3
    row, head [c0 c1 c2 c3] -> [c4 c5 c6 c7] -> [c8 c9 .. ..] -> state          no reads, writes zeros

Within a chunk, a decay per channel cannot be taken out of the sum over channels: scores come from log2(64) = 6 levels.
At the level of size s, blocks of 2 s tokens are cut in halves, and each token of a right half attends to those of its
left half: the token's decays since the border times the key's decays up to the border, neither of which is above 1.
Each pair of tokens is in one level, and the sums are made by doubling, without any difference:

    since the start of its block of s tokens   since[t]                 doubles by adding the left neighbour's total
    after it to the end of its block           until[t]                 doubles by adding the right neighbour's total
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.compat import tpu_interpreter
from decodax.kernels_pallas.linear_attention.reference import FORGOTTEN
from decodax.kernels_pallas.online_softmax import precision
from decodax.kernels_pallas.selection import every_reason

CHUNK_TOKENS = 64
BLOCK_TOKENS = 256
_LANES = 128
_LEVELS = (1, 2, 4, 8, 16, 32)
_VMEM_BYTES = 14 * 2**20


@every_reason
def unsupported_reason(query: Any, key: Any, value: Any, log_decay: Any) -> Iterator[str | None]:
    """Every reason why this kernel does not support these operands."""
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        yield f"the TPU kernel takes float32 and bfloat16, not {query.dtype}"
    if key.dtype != query.dtype or value.dtype != query.dtype:
        yield f"the TPU kernel takes one dtype, not {query.dtype}, {key.dtype} and {value.dtype}"
    key_size, value_size = _padded_to_lanes(key.shape[3]), _padded_to_lanes(value.shape[3])
    tokens = BLOCK_TOKENS * (2 * (key_size + value_size) * query.dtype.itemsize + 4 * key_size)
    if 2 * tokens + 6 * 4 * key_size * value_size > _VMEM_BYTES:
        yield f"a head's state of {key.shape[3]} x {value.shape[3]} is too large for the TPU's fast memory"


def linear_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N I"],
    log_decay: Float[Array, "B T N H"] | Float[Array, "B T N 1"],
    state: Float[Array, "B N H I"],
    length: Int[Array, " B"],
    *,
    scale: float,
    interpret: bool,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B N H I"]]:
    """As the function of this name in `__init__.py`. Heads are in lanes: [B, T, N H], with H padded to 128."""
    batch, num_tokens, num_heads, key_size = query.shape
    value_size = value.shape[3]
    lanes, value_lanes = _padded_to_lanes(key_size), _padded_to_lanes(value_size)
    block_tokens = min(BLOCK_TOKENS, -(-num_tokens // CHUNK_TOKENS) * CHUNK_TOKENS)
    num_blocks = -(-num_tokens // block_tokens)
    padded_tokens = max(num_tokens, block_tokens)  # a last block that is not full needs no padding, one block does
    per_channel = log_decay.shape[3] != 1

    def in_lanes(tokens: Array) -> Array:
        width = _padded_to_lanes(tokens.shape[3])
        padding = ((0, 0), (0, padded_tokens - num_tokens), (0, 0), (0, width - tokens.shape[3]))
        return jnp.pad(tokens, padding).reshape(batch, padded_tokens, num_heads * width)

    def last_read(row: Any, block: Any, lengths: Any) -> Any:
        """The block to read: after the row's length the last one again, which costs nothing."""
        return jnp.minimum(block, jnp.maximum(pl.cdiv(lengths[row], block_tokens) - 1, 0))

    def tokens_spec(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, block_tokens, width), lambda b, n, i, lengths: (b, last_read(b, i, lengths), n))

    log_decay = log_decay.astype(jnp.float32)
    if per_channel:
        decays, decays_spec = in_lanes(log_decay), tokens_spec(lanes)
    else:
        chunks = block_tokens // CHUNK_TOKENS
        padding = ((0, 0), (0, 0), (0, num_blocks * block_tokens - num_tokens))
        decays = jnp.pad(jnp.moveaxis(log_decay[..., 0], 1, 2), padding)
        decays = decays.reshape(batch, num_heads, num_blocks, chunks, CHUNK_TOKENS)
        decays_spec = pl.BlockSpec(
            (None, None, None, chunks, CHUNK_TOKENS), lambda b, n, i, lengths: (b, n, last_read(b, i, lengths), 0, 0)
        )
    state_spec = pl.BlockSpec((None, None, lanes, value_lanes), lambda b, n, i, lengths: (b, n, 0, 0))
    output, state = pl.pallas_call(
        partial(_block, scale=scale, per_channel=per_channel),
        name="linear_attention",
        out_shape=(
            jax.ShapeDtypeStruct((batch, padded_tokens, num_heads * value_lanes), query.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, lanes, value_lanes), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, num_heads, num_blocks),
            in_specs=[tokens_spec(lanes), tokens_spec(lanes), tokens_spec(value_lanes), decays_spec, state_spec],
            out_specs=[
                pl.BlockSpec((None, block_tokens, value_lanes), lambda b, n, i, lengths: (b, i, n)),
                state_spec,
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=tpu_interpreter(interpret),
    )(
        length,
        in_lanes(query),
        in_lanes(key),
        in_lanes(value),
        decays,
        jnp.pad(state, ((0, 0), (0, 0), (0, lanes - key_size), (0, value_lanes - value_size))),
    )
    output = output.reshape(batch, padded_tokens, num_heads, value_lanes)
    return output[:, :num_tokens, :, :value_size], state[:, :, :key_size, :value_size]


def _padded_to_lanes(size: int) -> int:
    return -(-size // _LANES) * _LANES


def _block(
    lengths: Any,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    decay_ref: Any,
    first_state_ref: Any,
    output_ref: Any,
    state_ref: Any,
    *,
    scale: float,
    per_channel: bool,
) -> None:
    """Runs one step of the grid: the chunks of a block that hold tokens of the row."""
    row, block = pl.program_id(0), pl.program_id(2)
    block_tokens = query_ref.shape[0]
    num_left = lengths[row] - block * block_tokens

    @pl.when(block == 0)
    def _() -> None:
        state_ref[...] = first_state_ref[...]

    @pl.when(num_left < block_tokens)
    def _() -> None:
        output_ref[...] = jnp.zeros_like(output_ref)

    def chunk(index: Any, carry: None) -> None:
        start = pl.multiple_of(index * CHUNK_TOKENS, CHUNK_TOKENS)
        rows = pl.ds(start, CHUNK_TOKENS)
        exists = _iota((CHUNK_TOKENS, 1), 0) < num_left - start

        def read(ref: Any) -> jax.Array:
            # the scale of quantised keys and values would be multiplied in here
            return jnp.where(exists, ref[rows, :].astype(jnp.float32), 0.0)

        if per_channel:
            log_decay = jnp.maximum(read(decay_ref), FORGOTTEN)
        else:
            existing = _iota((1, CHUNK_TOKENS), 1) < num_left - start
            log_decay = jnp.maximum(jnp.where(existing, decay_ref[pl.ds(index, 1), :], 0.0), FORGOTTEN)
        weigh = _weights_per_channel if per_channel else _weights_per_head
        query, key, value = read(query_ref) * scale, read(key_ref), read(value_ref).astype(value_ref.dtype)
        score, since_start, until_end, total = weigh(query, key, log_decay, value_ref.dtype)
        output = _dot(score.astype(value.dtype), value)
        output += _dot((query * jnp.exp(since_start)).astype(value.dtype), state_ref[...].astype(value.dtype))
        output_ref[rows, :] = jnp.where(exists, output, 0.0).astype(output_ref.dtype)
        added = _dot((key * jnp.exp(until_end)).astype(value.dtype), value, ((0,), (0,)))
        state_ref[...] = state_ref[...] * jnp.exp(total) + added

    num_chunks = jnp.clip(pl.cdiv(num_left, CHUNK_TOKENS), 0, block_tokens // CHUNK_TOKENS)
    jax.lax.fori_loop(0, num_chunks, chunk, None)


def _weights_per_channel(
    query: jax.Array, key: jax.Array, log_decay: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Scores of a chunk [i, j]; log decays since its start and until its end [i, H], and in total [H, 1]."""
    num_tokens, num_channels = log_decay.shape
    token, reader, read = (_iota(log_decay.shape, 0), *_pairs(num_tokens))
    score = jnp.where(reader == read, jnp.sum(query * key, axis=1, keepdims=True), 0.0)
    since, until = log_decay, jnp.zeros_like(log_decay)
    for size in _LEVELS:
        is_right = (token & size) != 0
        decay = jnp.exp(jnp.where(is_right, since, until))
        product = _dot((query * decay).astype(dtype), (key * decay).astype(dtype), ((1,), (1,)))
        crosses = ((reader & size) != 0) & ((read | (2 * size - 1)) == (reader | (2 * size - 1))) & ((read & size) == 0)
        score = jnp.where(crosses, product, score)
        total = since + until
        since = since + jnp.where(is_right, pltpu.roll(total, size, 0), 0.0)
        until = until + jnp.where(is_right, 0.0, pltpu.roll(total, num_tokens - size, 0))
    in_all = (since + until)[:1]
    channel, other = _pairs(num_channels)
    return score, since, until, jnp.sum(jnp.where(channel == other, in_all, 0.0), axis=1, keepdims=True)


def _weights_per_head(
    query: jax.Array, key: jax.Array, log_decay: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As `_weights_per_channel`, for log decays [1, j]: what is [i, H] there is [i, 1]."""
    reader, read = _pairs(log_decay.shape[1])

    def summed(taken: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(taken, log_decay, 0.0), axis=1, keepdims=True)

    of_token = jnp.where(reader > read, summed(reader == read), 0.0)
    # [i, j] sums the decays of the tokens after j up to i
    between = _dot(jnp.where(reader >= read, 1.0, 0.0), of_token)
    score = _dot(query.astype(dtype), key.astype(dtype), ((1,), (1,)))
    score = jnp.where(reader >= read, score * jnp.exp(between), 0.0)
    return score, summed(read <= reader), summed(read > reader), jnp.sum(log_decay, axis=1, keepdims=True)


def _dot(left: jax.Array, right: jax.Array, axes: tuple[tuple[int, ...], tuple[int, ...]] = ((1,), (0,))) -> jax.Array:
    return jax.lax.dot_general(
        left, right, (axes, ((), ())), precision=precision(left.dtype), preferred_element_type=jnp.float32
    )


def _iota(shape: tuple[int, ...], dimension: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, dimension)


def _pairs(size: int) -> tuple[jax.Array, jax.Array]:
    """Row and column of each entry of a square."""
    return _iota((size, size), 0), _iota((size, size), 1)
