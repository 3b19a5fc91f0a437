"""Computes grouped matmuls on TPU: loops over tiles of rows and their groups, streaming each group's weights once.

Grid, the last axis fastest and both one after the other:

                 item 0          item 1          item 2          item 3 ...      (`work_list`, tiles in a grid of rows)
    columns 0    tile 0 group 0  tile 1 group 0  tile 1 group 1  tile 2 group 1
    columns 1    tile 0 group 0  ...

Blocks cover all of D, so a step is one product [rows, D] x [columns, D]^T and needs no scratch. Consecutive items of a
group request the same block of weights, which is then not loaded again; consecutive items of a tile of rows write into
the same block of the result, each its own rows, and it is stored after all have. Padding items request the blocks that
are loaded and do nothing.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from decodax.kernels_pallas.compat import tpu_interpreter
from decodax.kernels_pallas.grouped_matmul.work import power_of_two, rows_per_group, work_list
from decodax.kernels_pallas.online_softmax import precision
from decodax.kernels_pallas.selection import every_reason

_BLOCK_BYTES = 32 * 2**20  # of a chip's 128 MiB of VMEM, for blocks in two buffers each
_VMEM_BYTES = 64 * 2**20
_MOST_ROWS = 128
_LANES = 128


@every_reason
def unsupported_reason(tokens: Any, *weights: Any) -> Iterator[str | None]:
    if tokens.dtype not in (jnp.float32, jnp.bfloat16):
        yield f"the kernel takes float32 and bfloat16, not {tokens.dtype}"
    if _columns(tokens, *weights) == 0:
        yield f"blocks of {_LANES} columns of {tokens.shape[1]} numbers (D) do not fit into VMEM"


def grouped_matmul(tokens: jax.Array, weight: jax.Array, group_sizes: jax.Array, *, interpret: bool) -> jax.Array:
    return _grouped(tokens, (weight,), group_sizes, lambda product: product, "grouped_matmul", interpret)


def grouped_gate_up(
    tokens: jax.Array, gate: jax.Array, up: jax.Array, group_sizes: jax.Array, *, interpret: bool
) -> jax.Array:
    def combine(gated: jax.Array, raised: jax.Array) -> jax.Array:
        return gated / (1 + jnp.exp(-gated)) * raised

    return _grouped(tokens, (gate, up), group_sizes, combine, "grouped_gate_up", interpret)


def _grouped(
    tokens: jax.Array,
    weights: tuple[jax.Array, ...],
    group_sizes: jax.Array,
    combine: Callable[..., jax.Array],
    name: str,
    interpret: bool,
) -> jax.Array:
    (num_rows, size), num_outputs = tokens.shape, weights[0].shape[1]
    rows, columns = _rows(tokens, weights[0]), _columns(tokens, *weights)
    work = work_list(group_sizes, num_rows, rows, multiple=rows)
    prefetched = (work.row // rows, work.group, work.first, work.last, work.counts)
    a_tile = pl.BlockSpec((rows, size), lambda column, item, tile, *_: (tile[item], 0))
    a_weight = pl.BlockSpec((None, columns, size), lambda column, item, tile, group, *_: (group[item], column, 0))
    an_output = pl.BlockSpec((rows, columns), lambda column, item, tile, *_: (tile[item], column))
    return pl.pallas_call(
        partial(_body, combine=combine),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_outputs), tokens.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(pl.cdiv(num_outputs, columns), len(work.row)),
            in_specs=[a_tile, *(a_weight for _ in weights)],
            out_specs=an_output,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=tpu_interpreter(interpret),
        name=name,
    )(*prefetched, tokens, *weights)


def _body(
    tile_ref: Any,
    group_ref: Any,
    first_ref: Any,
    last_ref: Any,
    counts_ref: Any,
    tokens_ref: Any,
    *weight_and_output_refs: Any,
    combine: Callable[..., jax.Array],
) -> None:
    del group_ref
    *weight_refs, output_ref = weight_and_output_refs
    item = pl.program_id(1)
    num_products, num_items = counts_ref[0], counts_ref[1]

    def store(value: jax.Array) -> None:
        rows = jax.lax.broadcasted_iota(jnp.int32, value.shape, 0) + tile_ref[item] * value.shape[0]
        own = (rows >= first_ref[item]) & (rows < last_ref[item])
        before = output_ref[...].astype(jnp.float32)  # of earlier groups; garbage in rows of later ones
        output_ref[...] = jnp.where(own, value, before).astype(output_ref.dtype)

    @pl.when(item < num_products)
    def _() -> None:
        store(combine(*(_product(tokens_ref, weight_ref) for weight_ref in weight_refs)))

    @pl.when((item >= num_products) & (item < num_items))
    def _() -> None:
        store(jnp.zeros(output_ref.shape, jnp.float32))


def _product(tokens_ref: Any, weight_ref: Any) -> jax.Array:
    """[rows, D] x [columns, D]^T; a scale per column of quantised weights would multiply the result."""
    tokens, weight = tokens_ref[...], weight_ref[...]
    dimensions = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(
        tokens, weight, dimensions, precision=precision(tokens.dtype), preferred_element_type=jnp.float32
    )


def _rows(tokens: Any, weight: Any) -> int:
    return min(tokens.shape[0], power_of_two(rows_per_group(tokens, weight), 16, _MOST_ROWS))


def _columns(tokens: Any, *weights: Any) -> int:
    """Columns of the result in a block: the fewest blocks that fit, of even width; 0 if none fits."""
    (_, size), num_outputs, item_bytes = tokens.shape, weights[0].shape[1], tokens.dtype.itemsize
    rows = _rows(tokens, weights[0])
    bytes_per_column = 2 * item_bytes * (len(weights) * size + rows) + 4 * (len(weights) + 1) * rows
    most = (_BLOCK_BYTES - 2 * item_bytes * rows * size) // bytes_per_column
    if most >= num_outputs:
        return num_outputs
    if most < _LANES:
        return 0
    num_blocks = pl.cdiv(num_outputs, most // _LANES * _LANES)
    return pl.cdiv(pl.cdiv(num_outputs, num_blocks), _LANES) * _LANES
