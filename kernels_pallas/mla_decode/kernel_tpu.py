"""Computes MLA decode attention on TPU: copies each block of latents into VMEM once and uses it for both products.

    grid (B,), one step per row of the batch, in order

    cached blocks of all rows, in order:               row 0: 0 1 2 | row 1: (empty) | row 2: 0 1 | ...
    two buffers in VMEM, filled in turn:                      a b a |                |        b a | ...

While a block is multiplied, the next one is being copied, also from one row of the batch into the next, so that a short
row does not wait for its first block. Blocks after a row's length are not read. All M = T N queries of a row stay in
VMEM; a block is multiplied with tiles of at most 256 of them.

An array [B, S, H] with H < 128 has another layout in XLA, [B, H, S], which pads less. In a loop that also writes the
cache it keeps the layout that is read here, so rope keys are copied before and after the loop, never inside; with
H = 128 (padded with zeros) there is no copy at all. A token's rope key takes 128 numbers here, whatever H.

What bounds it: a token of R + 128 numbers (R = 512: 1,280 bytes in bfloat16) costs 2 M (2 R + H) FLOP, so from about
M = 141 (v5e: 197 TFLOP/s, 819 GB/s) or M = 329 (v6e: 918 TFLOP/s, 1,640 GB/s) the matrix unit bounds it, and below that
the bandwidth (figures: cloud.google.com/tpu/docs/v5e and v6e).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.compat import tpu_interpreter
from decodax.kernels_pallas.mla_decode.new_latents import NewLatents, mask_nonfinite, packed
from decodax.kernels_pallas.online_softmax import (
    MASKED,
    OnlineSoftmax,
    absorb,
    capped,
    empty_softmax,
    finish,
    precision,
)
from decodax.kernels_pallas.selection import every_reason

BLOCK_TOKENS = 512
TILE_ROWS = 256
MAX_ROWS = 2048
_ALIGNMENT = 8  # tokens: where a copy out of a larger cache starts
_LANES = 128
_VMEM_BYTES = 64 * 2**20  # of 128 MiB on v5e and v6e


@every_reason
def unsupported_reason(
    query_latent: Any, query_rope: Any, latent: Any, rope_key: Any, new: NewLatents | None
) -> Iterator[str | None]:
    """Every reason why this kernel does not support these operands (arrays or shapes)."""
    del rope_key, new
    num_rows = query_latent.shape[1] * query_latent.shape[2]
    capacity = latent.shape[1]
    if latent.shape[2] % _LANES:
        yield f"latents must have a multiple of {_LANES} numbers (R) on TPU, got {latent.shape[2]}"
    if query_rope.shape[3] % 8 or query_rope.shape[3] > _LANES:
        yield f"rope keys must have 8, 16, ... {_LANES} numbers (H) on TPU, got {query_rope.shape[3]}"
    if num_rows > MAX_ROWS:
        yield f"queries x heads must be at most {MAX_ROWS} on TPU, got {num_rows}"
    if capacity > BLOCK_TOKENS and capacity % _ALIGNMENT:
        yield (
            f"the cache's capacity (S) must be a multiple of {_ALIGNMENT} tokens on TPU, or at most {BLOCK_TOKENS}, "
            f"got {capacity}"
        )
    if latent.dtype not in (jnp.float32, jnp.bfloat16):
        yield f"the TPU kernel takes float32 and bfloat16, got {latent.dtype}"


def mla_decode(
    query_latent: Float[Array, "B T N R"],
    query_rope: Float[Array, "B T N H"],
    latent: Float[Array, "B S R"],
    rope_key: Float[Array, "B S H"],
    length: Int[Array, " B"],
    new: NewLatents | None,
    *,
    scale: float,
    softcap: float | None,
    interpret: bool,
) -> tuple[Float[Array, "B T N R"], Float[Array, "B T N"]]:
    """As the public function (see `__init__.py`), for operands without an `unsupported_reason`."""
    batch, num_queries, num_heads, rank = query_latent.shape
    num_rows, rope_size, capacity = num_queries * num_heads, query_rope.shape[3], latent.shape[1]
    num_tiles = -(-num_rows // TILE_ROWS)
    tile_rows = _multiple(-(-num_rows // num_tiles), 16)
    padded_rows = tile_rows * num_tiles
    block_tokens = min(BLOCK_TOKENS, capacity)

    def padded(rows: Array, axis: int, size: int) -> Array:
        widths = [(0, size - rows.shape[axis] if i == axis else 0) for i in range(rows.ndim)]
        return jnp.pad(rows, widths)

    operands = [padded(packed(query), 1, padded_rows) for query in (query_latent, query_rope)]
    if new is not None:
        new = mask_nonfinite(new)
        num_new = _multiple(new.latent.shape[1], 16)
        allowed = jnp.repeat(new.allowed, num_heads, axis=1).astype(jnp.int32)
        operands += [padded(new.latent, 1, num_new), padded(new.rope_key, 1, num_new)]
        operands += [padded(padded(allowed, 1, padded_rows), 2, num_new)]

    def of_row(size: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((1, *size), lambda b, *_: (b, 0, 0))

    output, lse = pl.pallas_call(
        functools.partial(
            _body,
            has_new=new is not None,
            capacity=capacity,
            tile_rows=tile_rows,
            score_of=functools.partial(capped, scale=scale, softcap=softcap),
        ),
        out_shape=(
            jax.ShapeDtypeStruct((batch, padded_rows, rank), query_latent.dtype),
            jax.ShapeDtypeStruct((batch, padded_rows, 1), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch,),
            in_specs=[of_row(operand.shape[1:]) for operand in operands] + [pl.BlockSpec(memory_space=pl.ANY)] * 2,
            out_specs=(of_row((padded_rows, rank)), of_row((padded_rows, 1))),
            scratch_shapes=[
                pltpu.VMEM((2, block_tokens, rank), latent.dtype),
                pltpu.VMEM((2, block_tokens, rope_size), rope_key.dtype),
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.VMEM((padded_rows, 1), jnp.float32),
                pltpu.VMEM((padded_rows, 1), jnp.float32),
                pltpu.VMEM((padded_rows, rank), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=_VMEM_BYTES),
        interpret=tpu_interpreter(interpret),
        name="mla_decode",
    )(*_order_of_blocks(length, capacity, block_tokens), *operands, latent, rope_key)
    return (
        output[:, :num_rows].reshape(query_latent.shape),
        lse[:, :num_rows, 0].reshape(batch, num_queries, num_heads),
    )


def _order_of_blocks(length: Int[Array, " B"], capacity: int, block_tokens: int) -> tuple[Array, Array, Array]:
    """Per row of the batch: its length, the number of blocks before it, and the next row that has any (B: none)."""
    length = jnp.clip(length.astype(jnp.int32), 0, capacity)
    num_blocks = (length + block_tokens - 1) // block_tokens
    before = jnp.cumsum(num_blocks, dtype=jnp.int32) - num_blocks
    batch = length.shape[0]
    filled = jnp.where(length > 0, jnp.arange(batch, dtype=jnp.int32), batch)
    after = jnp.concatenate([filled[1:], jnp.full((1,), batch, jnp.int32)])
    return length, before, jax.lax.cummin(after, reverse=True)


def _body(
    length_ref: Any,
    before_ref: Any,
    next_row_ref: Any,
    *operands: Any,
    has_new: bool,
    capacity: int,
    tile_rows: int,
    score_of: Callable[[Array], Array],
) -> None:
    query_latent_ref, query_rope_ref, *refs = operands
    new_refs, refs = (refs[:3], refs[3:]) if has_new else (None, refs)
    latent_ref, rope_key_ref, output_ref, lse_ref, latents, rope_keys, semaphores, *seen_refs = refs
    row = pl.program_id(0)
    length, before = length_ref[row], before_ref[row]
    block_tokens = latents.shape[1]
    num_blocks = pl.cdiv(length, block_tokens)
    num_tiles = query_latent_ref.shape[1] // tile_rows

    def start_of(block: Any) -> Any:
        # The last block may not fit: it starts earlier, and masks what the block before it has read.
        if capacity == block_tokens:
            return 0
        return pl.multiple_of(jnp.minimum(block * block_tokens, capacity - block_tokens), _ALIGNMENT)

    def copies(row: Any, block: Any, buffer: Any) -> list[Any]:
        tokens = pl.ds(start_of(block), block_tokens)
        return [
            pltpu.make_async_copy(latent_ref.at[row, tokens], latents.at[buffer], semaphores.at[0, buffer]),
            pltpu.make_async_copy(rope_key_ref.at[row, tokens], rope_keys.at[buffer], semaphores.at[1, buffer]),
        ]

    def start(row: Any, block: Any, buffer: Any) -> None:
        for copy in copies(row, block, buffer):
            copy.start()

    def absorb_tokens(tile: Any, latents: Array, rope_keys: Array, mask: Any) -> None:
        """Adds tokens to the softmax of a tile of queries; scales of quantised latents would be multiplied in here."""
        rows = pl.ds(pl.multiple_of(tile * tile_rows, 16), tile_rows)
        score = _product(query_latent_ref[0, rows], latents) + _product(query_rope_ref[0, rows], rope_keys)
        seen = absorb(OnlineSoftmax(*(ref[rows] for ref in seen_refs)), mask(rows, score_of(score)), latents)
        for ref, value in zip(seen_refs, seen, strict=True):
            ref[rows] = value

    for ref, value in zip(seen_refs, empty_softmax(*seen_refs[2].shape), strict=True):
        ref[...] = value
    pl.when((before == 0) & (num_blocks > 0))(lambda: start(row, 0, 0))
    if new_refs is not None:
        new_latent_ref, new_rope_key_ref, allowed_ref = new_refs

        @pl.loop(0, num_tiles)
        def _(tile: Any) -> None:
            absorb_tokens(
                tile,
                new_latent_ref[0],
                new_rope_key_ref[0],
                lambda rows, score: jnp.where(allowed_ref[0, rows] != 0, score, MASKED),
            )

    @pl.loop(0, num_blocks)
    def _(block: Any) -> None:
        buffer = jax.lax.rem(before + block, 2)
        is_last = block + 1 == num_blocks
        next_row = jnp.where(is_last, next_row_ref[row], row)

        @pl.when(next_row < pl.num_programs(0))
        def _() -> None:
            start(next_row, jnp.where(is_last, 0, block + 1), 1 - buffer)

        for copy in copies(row, block, buffer):
            copy.wait()
        first = start_of(block)

        @pl.when(first + block_tokens > length)
        def _() -> None:  # unwritten slots may be NaN, and 0 x NaN is NaN
            slot = first + jax.lax.broadcasted_iota(jnp.int32, latents.shape[1:], 0)
            latents[buffer] = jnp.where(slot < length, latents[buffer], jnp.zeros((), latents.dtype))

        def mask(rows: Any, score: Array) -> Array:
            slot = first + jax.lax.broadcasted_iota(jnp.int32, score.shape, 1)
            return jnp.where((slot < length) & (slot >= block * block_tokens), score, MASKED)

        @pl.loop(0, num_tiles)
        def _(tile: Any) -> None:
            absorb_tokens(tile, latents[buffer], rope_keys[buffer], mask)

    output, lse = finish(OnlineSoftmax(*(ref[...] for ref in seen_refs)))
    output_ref[0] = output.astype(output_ref.dtype)
    lse_ref[0] = lse


def _product(query: Array, key: Array) -> Array:
    """query [M, I] x keys [S, I] in float32."""
    return jax.lax.dot_general(
        query, key, (((1,), (1,)), ((), ())), precision=precision(key.dtype), preferred_element_type=jnp.float32
    )


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of
