"""Computes grouped matmuls on Hopper GPUs: tiles of rows that begin just before their group, two warpgroups per tile.

The grid has as many programs as run at a time. Program i does jobs i, i + programs, ..., numbered so that simultaneous
jobs share tokens and weights in the L2 cache:

    job          0       1     ...  7       8       9     ...        8 J                  J blocks of columns
    item         0       1     ...  7       0       1     ...        8   ...              (`work_list`)
    columns      0       0     ...  0       1       1     ...        0   ...

A job multiplies one item's rows with one block of its group's weights, in steps of `step_size` numbers of D. The two
warpgroups do the same on their half of the columns: each loads half of the tokens, its own weights, and waits for the
other's tokens. While one product runs in the tensor cores, the buffer of the one before is refilled. There is no warp
specialisation, so that the interpreter runs the kernel as it is.

Tiles begin at multiples of 8 rows, as copies into tiled memory must. A group's first and last tile may hold rows of its
neighbours, which another program writes: of such a tile the own rows are stored, in pieces of power-of-two rows, one
per set bit of their number (as in JAX's ragged_dot_mgpu). Nothing relies on stores that clip: where columns would reach
beyond the result, nothing is stored.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from decodax.kernels_pallas.compat import (
    TILING_ROWS,
    Warpgroup,
    aligned_rows,
    gpu_kernel,
    interpreter_clips,
    store_plainly,
)
from decodax.kernels_pallas.grouped_matmul.work import WorkList, rows_per_group, work_list
from decodax.kernels_pallas.hopper import num_cores
from decodax.kernels_pallas.padding import padded
from decodax.kernels_pallas.selection import every_reason

_WARPGROUPS = 2
_ITEMS_TOGETHER = 8
_INTERPRETED_PROGRAMS = 2  # up to JAX 0.10 the interpreter compiles each separately
_SWIZZLE_BYTES = 128
_SHARED_BYTES = 226 * 1024  # of the 227 KiB that a program may have (CUDA programming guide, compute capability 9.0)
_HALF_SHARED_BYTES = 112 * 1024 + 512  # so that two programs fit into the 228 KiB of a multiprocessor


@every_reason
def unsupported_reason(tokens: Any, *weights: Any, interpret: bool) -> Iterator[str | None]:
    taken = (jnp.bfloat16, jnp.float16, *((jnp.float32,) if interpret else ()))
    if tokens.dtype not in taken:
        yield f"the kernel takes bfloat16 and float16, not {tokens.dtype}"
    size, num_outputs = tokens.shape[1], weights[0].shape[1]
    if size % 64:
        yield f"the kernel takes tokens and weights of a multiple of 64 numbers (D), not {size}"
    if num_outputs % 64:
        yield f"the kernel takes weights of a multiple of 64 outputs (F), not {num_outputs}"


def grouped_matmul(tokens: jax.Array, weight: jax.Array, group_sizes: jax.Array, *, interpret: bool) -> jax.Array:
    return _grouped(tokens, (weight,), group_sizes, lambda product: product, "grouped_matmul", interpret)


def grouped_gate_up(
    tokens: jax.Array, gate: jax.Array, up: jax.Array, group_sizes: jax.Array, *, interpret: bool
) -> jax.Array:
    def combine(products: jax.Array) -> jax.Array:
        columns = products.shape[1] // 2
        gated, raised = products[:, :columns], products[:, columns:]
        return gated / (1 + jnp.exp(-gated)) * raised

    return _grouped(tokens, (gate, up), group_sizes, combine, "grouped_gate_up", interpret)


@dataclass(frozen=True)
class _Tile:
    """Sizes of a program's work.

    rows: of tokens.
    width: rows of weights per warpgroup, of all its matrices.
    num_weights: number of matrices.
    dtype: of the operands.
    """

    rows: int
    width: int
    num_weights: int
    dtype: Any

    @property
    def columns(self) -> int:
        """Columns of the result per warpgroup."""
        return self.width // self.num_weights

    @property
    def step_size(self) -> int:
        return _SWIZZLE_BYTES // self.dtype.itemsize

    @property
    def programs_per_multiprocessor(self) -> int:
        return 2 if self.rows == 64 and self.width == 64 else 1

    @property
    def stages(self) -> int:
        """Number of steps whose operands are kept: what fits beside the buffer for results."""
        shared_bytes = _SHARED_BYTES if self.programs_per_multiprocessor == 1 else _HALF_SHARED_BYTES
        step_bytes = _SWIZZLE_BYTES * (self.rows + _WARPGROUPS * self.width)
        result_bytes = _WARPGROUPS * self.rows * self.columns * self.dtype.itemsize
        return min((shared_bytes - result_bytes) // step_bytes, 5)


def _tile(tokens: jax.Array, weights: tuple[jax.Array, ...]) -> _Tile:
    """Chooses small tiles for few tokens, when reading the weights takes the time; columns divide the result's."""
    few = rows_per_group(tokens, weights[0]) <= 64
    is_narrow = len(weights) == 1 and (few or weights[0].shape[1] % 128)
    return _Tile(64 if few else 128, 64 if is_narrow else 128, len(weights), tokens.dtype)


def _grouped(
    tokens: jax.Array,
    weights: tuple[jax.Array, ...],
    group_sizes: jax.Array,
    combine: Callable[[jax.Array], jax.Array],
    name: str,
    interpret: bool,
) -> jax.Array:
    num_rows, num_outputs = tokens.shape[0], weights[0].shape[1]
    tile = _tile(tokens, weights)
    work = work_list(group_sizes, num_rows, tile.rows, multiple=TILING_ROWS)
    padded_rows, padded_outputs = max(tile.rows, pl.cdiv(num_rows, TILING_ROWS) * TILING_ROWS), num_outputs
    if interpret and not interpreter_clips():  # of reads
        padded_rows = num_rows + tile.rows
        padded_outputs = pl.cdiv(num_outputs, _WARPGROUPS * tile.columns) * _WARPGROUPS * tile.columns
        weights = tuple(padded(weight, 1, padded_outputs) for weight in weights)
    tokens = padded(tokens, 0, padded_rows)
    return _kernel(tile, work, tokens, weights, num_outputs, combine, name, interpret)[:num_rows]


def _kernel(
    tile: _Tile,
    work: WorkList,
    tokens: jax.Array,
    weights: tuple[jax.Array, ...],
    num_outputs: int,
    combine: Callable[[jax.Array], jax.Array],
    name: str,
    interpret: bool,
) -> jax.Array:
    num_blocks = pl.cdiv(num_outputs, _WARPGROUPS * tile.columns)
    jobs_together = _ITEMS_TOGETHER * num_blocks
    most_jobs = pl.cdiv(len(work.row), _ITEMS_TOGETHER) * jobs_together
    num_programs = min(most_jobs, num_cores() * tile.programs_per_multiprocessor)
    if interpret:
        num_programs = min(num_programs, _INTERPRETED_PROGRAMS)

    def body(counts_ref: Any, *more_refs: Any) -> None:
        program = jax.lax.axis_index("program")
        num_items = counts_ref[1]
        num_jobs = _divided(num_items + (_ITEMS_TOGETHER - 1), _ITEMS_TOGETHER)[0] * jobs_together
        *refs, all_done = more_refs

        def job(index: jax.Array, _: tuple[()]) -> tuple[()]:
            band, within = _divided(program + index * num_programs, jobs_together)
            block, item_of_band = _divided(within, _ITEMS_TOGETHER)
            item = band * _ITEMS_TOGETHER + item_of_band

            @pl.when(item < num_items)
            def _() -> None:
                _one_item(tile, combine, interpret, item, item < counts_ref[0], block, *refs)
                plgpu.barrier_arrive(all_done)
                plgpu.barrier_wait(all_done)

            return ()

        my_jobs = _divided(num_jobs - program + (num_programs - 1), num_programs)[0]
        jax.lax.fori_loop(jnp.int32(0), my_jobs, job, ())

    body.__name__ = name
    transforms = (plgpu.TilingTransform((TILING_ROWS, tile.step_size)), plgpu.SwizzleTransform(_SWIZZLE_BYTES))
    scratch_types = [
        plgpu.SMEM((tile.stages, tile.rows, tile.step_size), tokens.dtype, transforms=transforms),
        plgpu.SMEM((tile.stages, _WARPGROUPS, tile.width, tile.step_size), tokens.dtype, transforms=transforms),
        plgpu.SMEM((_WARPGROUPS, tile.rows, tile.columns), tokens.dtype),
        plgpu.Barrier(num_arrivals=_WARPGROUPS * (1 + len(weights)), num_barriers=tile.stages),
        plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=tile.stages),
        *([plgpu.SMEM((_WARPGROUPS, tile.rows, tile.width), jnp.float32)] if interpret else ()),
        plgpu.Barrier(num_arrivals=_WARPGROUPS),
    ]
    return gpu_kernel(
        body,
        jax.ShapeDtypeStruct((tokens.shape[0], num_outputs), tokens.dtype),
        grid=(num_programs,),
        grid_names=("program",),
        num_threads=_WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=scratch_types,
        interpret=interpret,
    )(work.counts, work.row, work.group, work.first, work.last, tokens, *weights)


def _divided(number: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    return jax.lax.div(number, jnp.int32(by)), jax.lax.rem(number, jnp.int32(by))


def _one_item(
    tile: _Tile,
    combine: Callable[[jax.Array], jax.Array],
    interpret: bool,
    item: jax.Array,
    has_product: jax.Array,
    block: jax.Array,
    row_ref: Any,
    group_ref: Any,
    first_ref: Any,
    last_ref: Any,
    tokens_ref: Any,
    *refs: Any,
) -> None:
    weight_refs, (output_ref, *scratch_refs) = refs[: tile.num_weights], refs[tile.num_weights :]
    token_places, weight_places, result_places, filled, emptied, *interpreter_places = scratch_refs
    warpgroup, me = Warpgroup(interpret), jax.lax.axis_index("warpgroup")
    row, group, first = row_ref[item], group_ref[item], first_ref[item]
    num_own_rows = last_ref[item] - first
    column = (block * _WARPGROUPS + me) * tile.columns
    has_columns = column < output_ref.shape[1]  # the last block of columns may be one warpgroup's alone
    num_steps = tokens_ref.shape[1] // tile.step_size

    def load(step: jax.Array, place: Any) -> None:
        """Loads this warpgroup's operands of a step; a scale of quantised weights would be loaded here too."""
        columns_of_step = pl.ds(step * tile.step_size, tile.step_size)
        my_rows = tile.rows // _WARPGROUPS
        plgpu.copy_gmem_to_smem(
            tokens_ref.at[aligned_rows(row + me * my_rows, my_rows), columns_of_step],
            token_places.at[place, pl.ds(me * my_rows, my_rows)],
            filled.at[place],
        )
        for index, weight_ref in enumerate(weight_refs):
            plgpu.copy_gmem_to_smem(
                weight_ref.at[group, aligned_rows(column, tile.columns), columns_of_step],
                weight_places.at[place, me, pl.ds(index * tile.columns, tile.columns)],
                filled.at[place],
            )

    def products(accumulator: Any) -> None:
        def step(index: jax.Array, _: tuple[()]) -> tuple[()]:
            place = jax.lax.rem(index, jnp.int32(tile.stages))
            plgpu.barrier_wait(filled.at[place])
            warpgroup.accumulate(accumulator, token_places.at[place], weight_places.at[place, me], transpose_right=True)
            warpgroup.wait_products(1)

            @pl.when((index > 0) & (index - 1 + tile.stages < num_steps))
            def _() -> None:
                before = jax.lax.rem(index - 1, jnp.int32(tile.stages))
                plgpu.barrier_arrive(emptied.at[before])
                plgpu.barrier_wait(emptied.at[before])
                load(index - 1 + tile.stages, before)

            return ()

        jax.lax.fori_loop(jnp.int32(0), jnp.int32(num_steps), step, ())
        warpgroup.wait_products(0)

    def store_in_pieces(value: jax.Array) -> None:
        place = result_places.at[me]
        store_plainly(place, value)
        plgpu.commit_smem()
        for size in _powers_of_two(tile.rows):
            done = num_own_rows & ~(2 * size - 1)

            @pl.when(num_own_rows & size != 0)
            def _(size: int = size, done: jax.Array = done) -> None:
                plgpu.copy_smem_to_gmem(
                    place.at[pl.ds(first - row + done, size)],
                    output_ref.at[pl.ds(first + done, size), pl.ds(column, tile.columns)],
                )

    def store_full_tile(value: jax.Array) -> None:
        """Stores through the buffers of this warpgroup's own weights, which are not read any more."""
        pieces = range(tile.columns // tile.step_size)
        for piece in pieces:
            columns = value[:, piece * tile.step_size : (piece + 1) * tile.step_size]
            weight_places[piece, me, pl.ds(0, tile.rows)] = columns
        plgpu.commit_smem()
        for piece in pieces:
            plgpu.copy_smem_to_gmem(
                weight_places.at[piece, me, pl.ds(0, tile.rows)],
                output_ref.at[aligned_rows(row, tile.rows), pl.ds(column + piece * tile.step_size, tile.step_size)],
            )

    @pl.when(has_product)
    def _() -> None:
        for place in range(min(tile.stages, num_steps)):
            load(jnp.int32(place), place)
        interpreted = interpreter_places[0].at[me] if interpret else None
        value = combine(warpgroup.sum_of_products(products, (tile.rows, tile.width), interpreted)).astype(
            output_ref.dtype
        )
        is_full = num_own_rows == tile.rows
        if tile.columns // tile.step_size <= tile.stages and tile.rows <= tile.width:
            pl.when(has_columns & is_full)(lambda: store_full_tile(value))
            pl.when(has_columns & ~is_full)(lambda: store_in_pieces(value))
        else:
            pl.when(has_columns)(lambda: store_in_pieces(value))

    @pl.when(~has_product & has_columns)
    def _() -> None:
        store_in_pieces(warpgroup.full((tile.rows, tile.columns), 0.0).astype(output_ref.dtype))

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _powers_of_two(largest: int) -> list[int]:
    return [1 << exponent for exponent in reversed(range(int(math.log2(largest)) + 1))]
