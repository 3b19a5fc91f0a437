"""Computes linear attention with decay on Hopper GPUs (Mosaic GPU): chunks of 64 tokens through the matrix units.

Grid (B, N, I / 64): one warpgroup per (row, head, 64 value channels) loops over the row's chunks with its 64 columns of
the state in registers, while the next chunk is being copied.

    row, head, values 0..63      [chunk 0] -> [chunk 1] -> ... -> [chunk ceil(length / 64) - 1] -> state, zeros
    row, head, values 64..127    [chunk 0] -> [chunk 1] -> ...

With a decay per channel, a first kernel computes for all chunks at once (grid (B, N, chunks)) what does not depend on
the state: scores [64, 64] and the decayed queries and keys, so that the loop over chunks has only products. Its scores
come from log2(64) = 6 levels. At the level of size s, blocks of 2 s tokens are cut in halves, and each token of a right
half attends to those of its left half: the token's decays since the border times the key's decays up to the border,
neither of which is above 1.

Exponents are sums of decays, never differences: products of a matrix of zeros and ones with the decays, split into two
bfloat16 terms (an exponent is accurate to 2^-17 of itself, so a weight to 3e-6).

A head of more than 128 key channels is computed as several heads that share values, and whose outputs are summed.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.compat import Warpgroup, aligned_rows, gpu_kernel, tiled
from decodax.kernels_pallas.linear_attention.reference import FORGOTTEN
from decodax.kernels_pallas.selection import every_reason

CHUNK_TOKENS = 64  # the rows of a matrix product
TILE = 64  # channels at a time
_LEVELS = (1, 2, 4, 8, 16, 32)
_SQUARE = (CHUNK_TOKENS, CHUNK_TOKENS)
_PER_ROW = plgpu.Layout.WGMMA.reduce(1)


@every_reason
def unsupported_reason(query: Any, key: Any, value: Any, log_decay: Any, *, interpret: bool) -> Iterator[str | None]:
    """Every reason why this kernel does not support these operands."""
    dtypes = (jnp.bfloat16, jnp.float16, jnp.float32) if interpret else (jnp.bfloat16, jnp.float16)
    if query.dtype not in dtypes:
        yield f"the GPU kernel takes bfloat16 and float16, not {query.dtype}"
    if key.dtype != query.dtype or value.dtype != query.dtype:
        yield f"the GPU kernel takes one dtype, not {query.dtype}, {key.dtype} and {value.dtype}"
    if query.shape[3] % TILE or value.shape[3] % TILE:
        yield f"the GPU kernel takes heads of a multiple of {TILE} channels, not {query.shape[3]} and {value.shape[3]}"


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
    """As the function of this name in `__init__.py`."""
    batch, num_tokens, num_heads, key_size = query.shape
    split_size = key_size if key_size <= 2 * TILE else 2 * TILE if key_size % (2 * TILE) == 0 else TILE
    num_splits = key_size // split_size
    padded_tokens = pl.cdiv(num_tokens, CHUNK_TOKENS) * CHUNK_TOKENS

    def padded(tokens: Array) -> Array:
        return jnp.pad(tokens, ((0, 0), (0, padded_tokens - num_tokens), (0, 0), (0, 0)))

    def split_heads(tokens: Array) -> Array:
        return padded(tokens).reshape(batch, padded_tokens, num_heads * num_splits, split_size)

    query, key, values = split_heads(query), split_heads(key), padded(value)
    log_decay = log_decay.astype(jnp.float32)
    first_state = state.reshape(batch, num_heads * num_splits, split_size, -1)
    if log_decay.shape[3] == 1:
        decay = jnp.repeat(jnp.moveaxis(padded(log_decay)[..., 0], 1, 2), num_splits, axis=1)
        chunks = (query, key, _summed_per_head(decay, length))
    else:
        chunks = _prepared(query, key, split_heads(log_decay), length, scale=scale, interpret=interpret)
    output, state = _walk(chunks, values, first_state, length, scale=scale, interpret=interpret)
    if num_splits > 1:
        output = output.reshape(batch, padded_tokens, num_heads, num_splits, -1).sum(axis=3)
    return output[:, :num_tokens].astype(value.dtype), state.reshape(batch, num_heads, key_size, -1)


def _summed_per_head(log_decay: Float[Array, "B N T"], length: Int[Array, " B"]) -> Float[Array, "B N chunks _"]:
    """Per chunk: log decays (0 where no token exists), their sums since its start, and after each token to its end."""
    exists = jnp.arange(log_decay.shape[2])[None] < length[:, None]
    log_decay = jnp.where(exists[:, None], jnp.maximum(log_decay, FORGOTTEN), 0.0)
    chunks = log_decay.reshape(*log_decay.shape[:2], -1, CHUNK_TOKENS)
    after = jnp.pad(chunks[..., 1:], ((0, 0), (0, 0), (0, 0), (0, 1)))
    sums = jnp.cumsum(chunks, axis=3), jax.lax.cumsum(after, axis=3, reverse=True)
    return jnp.concatenate([chunks, *sums], axis=3)


def _walk(
    chunks: tuple[Array, ...],
    value: Float[Array, "B T heads I"],
    state: Float[Array, "B N H I"],
    length: Int[Array, " B"],
    *,
    scale: float,
    interpret: bool,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B N H I"]]:
    """Runs the recurrence over chunks.

    chunks: (queries, keys, `_summed_per_head`), or the result of `_prepared`.
    value, state, length, scale, interpret: as for `linear_attention`.
    """
    batch, num_heads, key_size, value_size = state.shape
    num_splits = num_heads // value.shape[2]
    out_dtype = value.dtype if num_splits == 1 else jnp.float32
    per_head = len(chunks) == 3
    # a sum over all tokens may leave float16's range: there the state is multiplied as bfloat16
    state_dtype = jnp.bfloat16 if value.dtype == jnp.float16 else value.dtype
    warpgroup = Warpgroup(interpret)
    weigh = partial(_chunk_per_head if per_head else _chunk_prepared, warpgroup, scale=scale)

    def linear_attention_walk(length_ref: Any, *refs: Any) -> None:
        chunk_refs, refs = refs[: len(chunks)], refs[len(chunks) :]
        value_ref, first_state_ref, output_ref, state_ref, *scratch, arrived = refs
        wide_state, narrow_state, output_tile, *scratch = scratch
        row, head, values = (jax.lax.axis_index(name) for name in ("row", "head", "values"))
        mine = pl.ds(values * TILE, TILE)
        num_existing = length_ref[row]
        slices = [pl.ds(start, TILE) for start in range(0, key_size, TILE)]

        plgpu.copy_gmem_to_smem(first_state_ref.at[row, head, :, mine], wide_state, arrived)
        plgpu.barrier_wait(arrived)
        first = tuple(warpgroup.load(wide_state.at[channels, :]) for channels in slices)

        def round_state(state: tuple[jax.Array, ...], here: Any) -> None:
            for channels, block in zip(slices, state, strict=True):
                narrow_state[here, channels, :] = block.astype(state_dtype)
            plgpu.commit_smem()

        def write_output(chunk: Any, output: jax.Array) -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's
            exists = warpgroup.iota(output.shape, 0) < num_existing - chunk * CHUNK_TOKENS
            output_tile[...] = jnp.where(exists, output, 0.0).astype(out_dtype)
            plgpu.commit_smem()
            rows = aligned_rows(chunk * CHUNK_TOKENS, CHUNK_TOKENS)
            plgpu.copy_smem_to_gmem(output_tile, output_ref.at[row, rows, head, mine])

        def chunk(index: Any, *step_refs: Any) -> tuple[jax.Array, ...]:
            *inputs, state = step_refs
            (number,) = index
            # 0, but not for the compiler: it would lift 100 registers of addresses of fixed buffers out of the loop
            here = number >> 30
            tiles = [tile.at[here] for tile in scratch]
            num_left = num_existing - number * CHUNK_TOKENS
            state = weigh(inputs, state, narrow_state.at[here], tiles, num_left, partial(write_output, number))
            round_state(state, here)
            return state

        def write_zeros(number: Any, carry: None) -> None:
            write_output(number, warpgroup.full((CHUNK_TOKENS, TILE), 0.0))

        round_state(first, 0)
        num_chunks = pl.cdiv(num_existing, CHUNK_TOKENS)
        steps = plgpu.emit_pipeline(
            chunk,
            grid=(num_chunks,),
            in_specs=_specs(per_head, key_size, value.dtype),
            max_concurrent_steps=2,
            init_carry=first,
        )
        if per_head:
            tokens = tuple(ref.at[row, :, head, :] for ref in chunk_refs[:2])
            sources = (*tokens, chunk_refs[2].at[row, head])
        else:
            sources = tuple(ref.at[row, head] for ref in chunk_refs)
        last = steps(*sources, value_ref.at[row, :, head // num_splits, mine])
        jax.lax.fori_loop(num_chunks, value_ref.shape[1] // CHUNK_TOKENS, write_zeros, None)
        for channels, block in zip(slices, last, strict=True):
            wide_state[channels, :] = block
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(wide_state, state_ref.at[row, head, :, mine])
        plgpu.wait_smem_to_gmem(0)

    square = plgpu.SMEM((1, *_SQUARE), value.dtype, transforms=tiled(TILE, value.dtype))
    exponent = plgpu.SMEM((1, *_SQUARE), jnp.bfloat16, transforms=tiled(TILE, jnp.bfloat16))
    return gpu_kernel(
        linear_attention_walk,
        (
            jax.ShapeDtypeStruct((batch, value.shape[1], num_heads, value_size), out_dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
        ),
        grid=(batch, num_heads, value_size // TILE),
        grid_names=("row", "head", "values"),
        scratch_types=[
            plgpu.SMEM((key_size, TILE), jnp.float32, transforms=tiled(TILE, jnp.float32)),
            plgpu.SMEM((1, key_size, TILE), state_dtype, transforms=tiled(TILE, state_dtype)),
            plgpu.SMEM((CHUNK_TOKENS, TILE), out_dtype, transforms=tiled(TILE, out_dtype)),
            *((square, exponent, exponent) if per_head else ()),
            plgpu.Barrier(),
        ],
        interpret=interpret,
    )(length, *chunks, value, state)


def _specs(per_head: bool, key_size: int, dtype: Any) -> list[plgpu.BlockSpec]:
    """The specs of what a step of the loop loads: of `chunks`, then of the values."""

    def rows(num_columns: int) -> plgpu.BlockSpec:
        return plgpu.BlockSpec((CHUNK_TOKENS, num_columns), lambda i: (i, 0), transforms=tiled(TILE, dtype))

    def per_chunk(size: int) -> plgpu.BlockSpec:
        return plgpu.BlockSpec((None, size), lambda i: (i, 0))

    if per_head:
        return [rows(key_size), rows(key_size), per_chunk(3 * CHUNK_TOKENS), rows(TILE)]
    return [rows(key_size), rows(key_size), rows(CHUNK_TOKENS), per_chunk(key_size), rows(TILE)]


def _chunk_per_head(
    warpgroup: Warpgroup,
    inputs: Any,
    state: tuple[jax.Array, ...],
    narrow_state: Any,
    scratch: Any,
    num_left: Any,
    write_output: Callable[[jax.Array], None],
    *,
    scale: float,
) -> tuple[jax.Array, ...]:
    """A chunk of the loop with one decay per token: writes the output and returns the next state."""
    query_tile, key_tile, decay_tile, value_tile = inputs
    square_tile, high_tile, low_tile = scratch
    _clear_rows(warpgroup, (key_tile, value_tile), num_left)

    def per_row(number: int) -> jax.Array:
        return warpgroup.load(decay_tile.at[pl.ds(number * CHUNK_TOKENS, CHUNK_TOKENS)], _PER_ROW)

    reader, read = warpgroup.iota(_SQUARE, 0), warpgroup.iota(_SQUARE, 1)
    of_token = jnp.where(read < reader, warpgroup.rows(per_row(0), _SQUARE), 0.0)
    _write_split(warpgroup, of_token, high_tile, low_tile)
    plgpu.commit_smem()

    # [i, j] sums the decays of the tokens after j up to i
    between = _sums(warpgroup, read <= reader, high_tile, low_tile)
    score = warpgroup.dot(query_tile, key_tile, transpose_right=True) * jnp.exp(between)
    score = jnp.where(read <= reader, score, 0.0)
    square_tile[...] = score.astype(value_tile.dtype)
    plgpu.commit_smem()
    output = _read_state(warpgroup, query_tile, narrow_state)
    output = output * warpgroup.rows(jnp.exp(per_row(1)), output.shape)
    output = warpgroup.dot_add(output, square_tile, value_tile)
    write_output(output * scale)
    value = warpgroup.load(value_tile).astype(jnp.float32)
    square_tile[...] = (value * warpgroup.rows(jnp.exp(per_row(2)), value.shape)).astype(value_tile.dtype)
    plgpu.commit_smem()
    decay = jnp.exp(per_row(1) + per_row(2))  # of the full chunk, in each of 64 entries
    return tuple(
        warpgroup.dot_add(
            block * warpgroup.rows(decay, block.shape),
            key_tile.at[:, pl.ds(number * TILE, TILE)],
            square_tile,
            transpose_left=True,
        )
        for number, block in enumerate(state)
    )


def _chunk_prepared(
    warpgroup: Warpgroup,
    inputs: Any,
    state: tuple[jax.Array, ...],
    narrow_state: Any,
    scratch: Any,
    num_left: Any,
    write_output: Callable[[jax.Array], None],
    *,
    scale: float,
) -> tuple[jax.Array, ...]:
    """A chunk of the loop after `_prepared`, which has multiplied by the scale: as `_chunk_per_head`."""
    query_tile, key_tile, score_tile, decay_tile, value_tile = inputs
    _clear_rows(warpgroup, (value_tile,), num_left)
    output = warpgroup.dot_add(_read_state(warpgroup, query_tile, narrow_state), score_tile, value_tile)
    write_output(output)

    def next_block(number: int, block: jax.Array) -> jax.Array:
        channels = pl.ds(number * TILE, TILE)
        decay = warpgroup.load(decay_tile.at[channels], _PER_ROW)
        kept = block * warpgroup.rows(decay, block.shape)
        return warpgroup.dot_add(kept, key_tile.at[:, channels], value_tile, transpose_left=True)

    return tuple(next_block(number, block) for number, block in enumerate(state))


def _prepared(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    log_decay: Float[Array, "B T N H"],
    length: Int[Array, " B"],
    *,
    scale: float,
    interpret: bool,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T H"], Float[Array, "B N T chunk"], Float[Array, "B N chunks H"]]:
    """Per chunk: queries decayed since its start, keys decayed until its end, scores, and its total decay.

    Chunks after a row's length stay unwritten. Arguments as for `linear_attention`.
    """
    batch, num_tokens, num_heads, key_size = query.shape
    num_chunks = num_tokens // CHUNK_TOKENS
    warpgroup = Warpgroup(interpret)
    dtype = query.dtype

    def linear_attention_prepare(length_ref: Any, query_ref: Any, key_ref: Any, decay_ref: Any, *refs: Any) -> None:
        query_out, key_out, score_out, total_out, *tiles, arrived = refs
        inputs, total_tile = zip((query_ref, key_ref, decay_ref), tiles[:3], strict=True), tiles[-1]
        row, head, chunk = (jax.lax.axis_index(name) for name in ("row", "head", "chunk"))
        start = chunk * CHUNK_TOKENS
        rows = aligned_rows(start, CHUNK_TOKENS)

        @pl.when(start < length_ref[row])
        def _() -> None:
            for ref, tile in inputs:
                plgpu.copy_gmem_to_smem(ref.at[row, rows, head, :], tile, arrived)
            plgpu.barrier_wait(arrived)
            outputs = query_out.at[row, head, rows], key_out.at[row, head, rows], score_out.at[row, head, rows]
            _prepare_chunk(warpgroup, tiles, outputs, length_ref[row] - start, scale)
            plgpu.copy_smem_to_gmem(total_tile, total_out.at[row, head, chunk])
            plgpu.wait_smem_to_gmem(0)

    def tile(width: int, of: Any) -> Any:
        return plgpu.SMEM((CHUNK_TOKENS, width), of, transforms=tiled(TILE, of))

    return gpu_kernel(
        linear_attention_prepare,
        (
            jax.ShapeDtypeStruct((batch, num_heads, num_tokens, key_size), dtype),
            jax.ShapeDtypeStruct((batch, num_heads, num_tokens, key_size), dtype),
            jax.ShapeDtypeStruct((batch, num_heads, num_tokens, CHUNK_TOKENS), dtype),
            jax.ShapeDtypeStruct((batch, num_heads, num_chunks, key_size), jnp.float32),
        ),
        grid=(batch, num_heads, num_chunks),
        grid_names=("row", "head", "chunk"),
        scratch_types=[
            tile(key_size, dtype),
            tile(key_size, dtype),
            tile(key_size, jnp.float32),
            tile(key_size, jnp.bfloat16),
            tile(key_size, jnp.bfloat16),
            tile(TILE, dtype),
            plgpu.SMEM((key_size,), jnp.float32),
            plgpu.Barrier(num_arrivals=3),
        ],
        interpret=interpret,
    )(length, query, key, log_decay)


def _prepare_chunk(warpgroup: Warpgroup, tiles: Any, outputs: Any, num_left: Any, scale: float) -> None:
    """Writes a chunk's queries, keys and scores to `outputs`, and its total decay to the last of the tiles."""
    query_tile, key_tile, decay_tile, high_tile, low_tile, stage_tile, total_tile = tiles
    dtype = query_tile.dtype
    width = (CHUNK_TOKENS, TILE)
    exists = warpgroup.iota(width, 0) < num_left
    reader, read = warpgroup.iota(_SQUARE, 0), warpgroup.iota(_SQUARE, 1)
    slices = [pl.ds(start, TILE) for start in range(0, query_tile.shape[1], TILE)]

    def load(tile: Any, channels: Any) -> jax.Array:
        # the scale of quantised keys would be multiplied in here
        return jnp.where(exists, warpgroup.load(tile.at[:, channels]).astype(jnp.float32), 0.0)

    def load_query(channels: Any) -> jax.Array:
        return load(query_tile, channels) * scale

    def decays(taken: jax.Array, channels: Any) -> jax.Array:
        return jnp.exp(_sums(warpgroup, taken, high_tile.at[:, channels], low_tile.at[:, channels]))

    def stage(values: jax.Array) -> None:
        plgpu.commit_smem()  # waits until all warps have read it
        stage_tile[...] = values.astype(dtype)
        plgpu.commit_smem()

    def write(values: jax.Array, target: Any) -> None:
        stage(values)
        plgpu.copy_smem_to_gmem(stage_tile, target)
        plgpu.wait_smem_to_gmem(0)

    own = warpgroup.column(CHUNK_TOKENS)
    for channels in slices:
        log_decay = jnp.maximum(load(decay_tile, channels), FORGOTTEN)
        _write_split(warpgroup, log_decay, high_tile.at[:, channels], low_tile.at[:, channels])
        total_tile[channels] = jnp.exp(jnp.sum(log_decay, axis=0))
        own = own + jnp.sum(load_query(channels) * load(key_tile, channels), axis=1)
    plgpu.commit_smem()

    score = jnp.where(reader == read, warpgroup.rows(own, _SQUARE), 0.0)
    for size in _LEVELS:
        is_right = (reader & size) != 0
        same_half = (reader | (size - 1)) == (read | (size - 1))
        taken = same_half & ((is_right & (read <= reader)) | (~is_right & (read > reader)))
        product = warpgroup.full(_SQUARE, 0.0)
        for channels in slices:
            decay = decays(taken, channels)
            stage(load(key_tile, channels) * decay)
            decayed = (load_query(channels) * decay).astype(dtype)
            product = warpgroup.dot_add(product, decayed, stage_tile, transpose_right=True)
        crosses = is_right & ((read & size) == 0) & ((reader | (2 * size - 1)) == (read | (2 * size - 1)))
        score = jnp.where(crosses, product, score)
    query_out, key_out, score_out = outputs
    write(score, score_out)
    for channels in slices:
        write(load_query(channels) * decays(read <= reader, channels), query_out.at[:, channels])
        write(load(key_tile, channels) * decays(read > reader, channels), key_out.at[:, channels])


def _read_state(warpgroup: Warpgroup, query_tile: Any, narrow_state: Any) -> jax.Array:
    if query_tile.dtype == narrow_state.dtype:
        return warpgroup.dot(query_tile, narrow_state)
    return warpgroup.dot(warpgroup.load(query_tile).astype(narrow_state.dtype), narrow_state)


def _clear_rows(warpgroup: Warpgroup, tiles: Any, num_left: Any) -> None:
    """Zeros the rows of tiles from `num_left` on, which may hold anything."""

    @pl.when(num_left < CHUNK_TOKENS)
    def _() -> None:
        for tile in tiles:
            for start in range(0, tile.shape[1], TILE):
                block = tile.at[:, pl.ds(start, TILE)]
                exists = warpgroup.iota((CHUNK_TOKENS, TILE), 0) < num_left
                kept = jnp.where(exists, warpgroup.load(block).astype(jnp.float32), 0.0)
                block[...] = kept.astype(tile.dtype)
        plgpu.commit_smem()


def _write_split(warpgroup: Warpgroup, values: jax.Array, high_tile: Any, low_tile: Any) -> None:
    """Writes float32 as the sum of two bfloat16. Interpreted, XLA would drop a conversion there and back."""
    high = jax.lax.reduce_precision(values, 8, 7) if warpgroup.interpret else values.astype(jnp.bfloat16)
    high_tile[...] = high.astype(jnp.bfloat16)
    low_tile[...] = (values - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _sums(warpgroup: Warpgroup, taken: jax.Array, high_tile: Any, low_tile: Any) -> jax.Array:
    """[i, j]: the sum of what `_write_split` wrote into column j, over the rows t with taken[i, t]."""
    factors = jnp.where(taken, 1.0, 0.0).astype(jnp.bfloat16)
    return warpgroup.dot_add(warpgroup.dot(factors, high_tile), factors, low_tile)
