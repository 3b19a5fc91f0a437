"""Hides the differences in Pallas between JAX 0.10 and 0.12, and between a GPU and its interpreter.

Kernels import Pallas and take from here what is not the same everywhere. JAX's GPU interpreter (kernels run on CPU,
with uninitialised memory as NaN) supports less than a GPU: up to 0.10 no layouts of registers and no transposed
operands. `Warpgroup` hides that difference, so that a kernel's body is written once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.core import LoweringSemantics
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

__all__ = [
    "TILING_ROWS",
    "Warpgroup",
    "aligned_rows",
    "gpu_kernel",
    "interpreter_clips",
    "store_plainly",
    "tpu_interpreter",
]

TILING_ROWS = 8  # of shared memory that is tiled for wgmma (`tiled`)

_NEW_INTERPRETER = hasattr(plgpu, "InterpretGPUParams")  # that of JAX 0.12


def tpu_interpreter(interpret: bool) -> Any:
    """`interpret=` of `pl.pallas_call` for a TPU kernel: simulated memory that starts as NaN, or no interpreter."""
    return pltpu.InterpretParams() if interpret else False


def _gpu_interpreter(interpret: bool) -> Any:
    if not interpret:
        return None
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams()  # pyright: ignore[reportAttributeAccessIssue]
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from 0.12 on

    return InterpretGPUParams()


def gpu_kernel(
    body: Callable[..., None],
    out_type: Any,
    *,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    scratch_types: Sequence[Any],
    interpret: bool,
    num_threads: int | None = None,
    thread_name: str | None = None,
    approximate_math: bool = True,
) -> Callable[..., Any]:
    """`plgpu.kernel` with every argument whose default differs between versions.

    body, out_type, grid, grid_names, scratch_types, num_threads, thread_name: as for `plgpu.kernel`.
    interpret: run on CPU.
    approximate_math: exponentials by the hardware's instruction (a few units in the last place of float32).
    """
    parameters = plgpu.CompilerParams(approx_math=approximate_math, lowering_semantics=LoweringSemantics.Lane)
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=grid,
        grid_names=grid_names,
        num_threads=num_threads,
        thread_name=thread_name,
        compiler_params=parameters,
        interpret=_gpu_interpreter(interpret),
    )


@dataclass(frozen=True)
class Warpgroup:
    """Operations of a warpgroup in a kernel's body. Interpreted, layouts have no effect and products are float32."""

    interpret: bool

    def full(self, shape: tuple[int, ...], value: float, layout: Any = None) -> jax.Array:
        """Registers that hold one float32 value; the layout of an accumulator unless another is given."""
        return self.layout_cast(jnp.full(shape, value, jnp.float32), plgpu.Layout.WGMMA if layout is None else layout)

    def column(self, num_rows: int) -> jax.Array:
        """float32 zeros, one per row of an accumulator."""
        return self.full((num_rows,), 0.0, plgpu.Layout.WGMMA.reduce(1))

    def layout_cast(self, value: jax.Array, layout: Any) -> jax.Array:
        return value if self.interpret else plgpu.layout_cast(value, layout)

    def load(self, ref: Any, layout: Any = None, *, is_shared: bool = True) -> jax.Array:
        """Loads memory, shared or not, into registers; in the layout of an accumulator unless another is given."""
        if self.interpret:
            return ref[...]
        layout = plgpu.Layout.WGMMA if layout is None else layout
        if hasattr(plgpu, "InterpretGPUParams"):
            return plgpu.load(ref, layout=layout, optimized=is_shared)  # pyright: ignore[reportCallIssue]
        return plgpu.load(ref, (), layout=layout, optimized=is_shared)

    def iota(self, shape: tuple[int, ...], dimension: int, layout: Any = None) -> jax.Array:
        """int32 0, 1, ... along a dimension; in the layout of an accumulator unless another is given."""
        if self.interpret:
            return jax.lax.broadcasted_iota(jnp.int32, shape, dimension)
        return plgpu.broadcasted_iota(
            jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA if layout is None else layout
        )

    def rows(self, per_row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """[M] as [M, N]: broadcasts a value per row to its columns."""
        return jax.lax.broadcast_in_dim(per_row, shape, [0])

    def dot(self, left: Any, right: Any, *, transpose_right: bool = False) -> jax.Array:
        """left [M, I] x right [I, N] (or [N, I], transposed) in float32, [M, N] in the layout of an accumulator.

        left: in shared memory, or registers in the accumulator's layout; right: in shared memory. M is 64.
        """
        num_columns = right.shape[0] if transpose_right else right.shape[1]
        if self.interpret:
            return self._plain_dot(left, right, transpose_right)

        def product(accumulator: Any) -> jax.Array:
            plgpu.wgmma(accumulator, left, _transposed(right) if transpose_right else right)
            return accumulator[...]

        return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((left.shape[0], num_columns), jnp.float32))

    def dot_add(
        self,
        accumulated: jax.Array,
        left: Any,
        right: Any,
        *,
        transpose_right: bool = False,
        transpose_left: bool = False,
    ) -> jax.Array:
        """accumulated [M, N] + left x right.

        accumulated: in registers.
        left, right, transpose_right: as for `dot`.
        transpose_left: left is [I, M] in shared memory.
        """
        if self.interpret:
            return accumulated + self._plain_dot(left[...].T if transpose_left else left, right, transpose_right)

        def product(accumulator: Any) -> None:
            rows = _transposed(left) if transpose_left else left
            plgpu.wgmma(accumulator, rows, _transposed(right) if transpose_right else right)
            plgpu.wgmma_wait(0)

        total: Any = pl.run_state(product)(plgpu.WGMMAAccumulatorRef.init(accumulated))
        return total

    def sum_of_products(self, add: Callable[[Any], None], shape: tuple[int, int], interpreted: Any) -> jax.Array:
        """The sum that `add(accumulator)` makes with `accumulate`, starting from zeros, in an accumulator's layout.

        add: makes the products.
        shape: of the sum.
        interpreted: float32 of this shape in shared memory, used instead of registers by interpreters up to 0.10.
        """
        if self._emulates_accumulators:
            interpreted[...] = jnp.zeros(shape, jnp.float32)
            add(interpreted)
            return interpreted[...]

        def summed(accumulator: Any) -> jax.Array:
            add(accumulator)
            return accumulator[...]

        return pl.run_scoped(summed, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))

    def accumulate(self, accumulator: Any, left: Any, right: Any, *, transpose_right: bool = False) -> None:
        """accumulator [M, N] += left x right, as `dot`, but asynchronously: `wait_products` waits.

        accumulator: of `sum_of_products`.
        left: in shared memory, M a multiple of 64.
        right, transpose_right: as for `dot`.
        """
        if self._emulates_accumulators:
            accumulator[...] = accumulator[...] + self._plain_dot(left, right, transpose_right)
        else:
            plgpu.wgmma(accumulator, left, _transposed(right) if transpose_right else right)

    def wait_products(self, num_running: int) -> None:
        """Waits until at most the last `num_running` products of `accumulate` are unfinished."""
        if not self._emulates_accumulators:
            plgpu.wgmma_wait(num_running)

    @property
    def _emulates_accumulators(self) -> bool:
        return self.interpret and not _NEW_INTERPRETER

    def _plain_dot(self, left: Any, right: Any, transpose_right: bool) -> jax.Array:
        dimensions = (((1,), (1 if transpose_right else 0,)), ((), ()))
        operands = (left[...].astype(jnp.float32), right[...].astype(jnp.float32))
        return jax.lax.dot_general(*operands, dimensions, precision=jax.lax.Precision.HIGHEST)


def _transposed(ref: Any) -> Any:
    return ref.T if hasattr(plgpu, "InterpretGPUParams") else plgpu.transpose_ref(ref, (1, 0))


def aligned_rows(start: Any, size: int) -> Any:
    """Rows of an array in GPU memory that are copied to or from tiled shared memory; `start` is a multiple of 8.

    A GPU copies whole tiles: from another row on it would lose rows, in silence, where an interpreter copies what it is
    told. So the start is rounded down, and wrong rows show everywhere.
    """
    return pl.ds(pl.multiple_of(start // TILING_ROWS * TILING_ROWS, TILING_ROWS), size)


def tiled(num_columns: int, dtype: Any) -> tuple[Any, Any]:
    """Transforms of shared memory for wgmma operands: tiles of 8 rows, with the widest swizzle that divides a row."""
    item_bytes = jnp.dtype(dtype).itemsize
    swizzle = math.gcd(num_columns * item_bytes, 128)
    return plgpu.TilingTransform((TILING_ROWS, swizzle // item_bytes)), plgpu.SwizzleTransform(swizzle)


def store_plainly(ref: Any, value: jax.Array) -> None:
    """Stores registers in an accumulator's layout to shared memory without tiles, from which any rows may be copied."""
    store = getattr(plgpu, "store", None)  # from 0.12 on, a store with bank conflicts is asked for by name
    if store is None:
        ref[...] = value
    else:
        store(ref, value, optimized=False)


def interpreter_clips() -> bool:
    """Whether interpreted copies clip as a GPU's: reads beyond an array's edge give zeros, writes there are dropped."""
    return _NEW_INTERPRETER
