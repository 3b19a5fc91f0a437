"""Packs queries as the rows of a wgmma for the GPU decode kernels, and describes their shared memory.

The queries of a batch row that share a key-value head are packed as the rows of one operand, T x G of them: row
t x G + g, in blocks of 64, the rows of a wgmma. Of blocks that are not full only the rows in use are read and written;
the others hold arbitrary numbers, and no row of a product depends on another.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from decodax.kernels_pallas.compat import tiled

BLOCK_QUERIES = 64
ROW = plgpu.Layout.WGMMA.reduce(1)  # of float32 or int32 registers, one per packed query


@dataclass(frozen=True)
class Sizes:
    """Sizes of packed queries: G x T rows per batch row and key-value head, in `num_groups` owners.

    group: query heads per key-value head, G.
    num_queries: T.
    head_size, value_size: numbers per key and per value.
    """

    group: int
    num_queries: int
    head_size: int
    value_size: int

    @property
    def num_packed(self) -> int:
        return self.group * self.num_queries

    @property
    def num_blocks(self) -> int:
        """Blocks whose outputs one program keeps in its registers; two, if they fit, share each tile."""
        return 1 if self.num_packed <= BLOCK_QUERIES or self.value_size > 64 else 2

    @property
    def num_groups(self) -> int:
        return pl.cdiv(self.num_packed, BLOCK_QUERIES * self.num_blocks)

    @property
    def block_rows(self) -> int:
        """Rows of a block that are read and written; the others of the 64 hold arbitrary numbers."""
        if self.num_groups * self.num_blocks > 1:
            return BLOCK_QUERIES
        return pl.cdiv(self.num_packed, 8) * 8

    @property
    def merge_columns(self) -> int:
        """Output columns of a program of the second kernel, which reads the same columns of the partial softmaxes."""
        return self.value_size if self.value_size <= 128 else math.gcd(self.value_size, 128)

    @property
    def output_columns(self) -> int:
        """Columns of a partial softmax that are written at once."""
        return math.gcd(self.value_size, 64) if self.value_size % 64 == 0 else self.value_size

    def pack(self, query: jax.Array) -> jax.Array:
        """[B, T, K, G, ...] as [B, K, groups, blocks, block_rows, ...]."""
        batch, _, num_kv_heads, _, *rest = query.shape
        packed = jnp.moveaxis(query, 1, 2).reshape(batch, num_kv_heads, self.num_packed, *rest)
        padding = self.num_groups * self.num_blocks * self.block_rows - self.num_packed
        if padding:
            packed = jnp.pad(packed, [(0, 0), (0, 0), (0, padding)] + [(0, 0)] * len(rest))
        return packed.reshape(batch, num_kv_heads, self.num_groups, self.num_blocks, self.block_rows, *rest)

    def pack_rows(self, per_query: jax.Array) -> jax.Array:
        """[B, T] as [B, groups x blocks, 64]: a value per query, the same for all heads, for every row of a wgmma."""
        batch, num_queries = per_query.shape
        repeated = jnp.broadcast_to(per_query[:, :, None, None], (batch, num_queries, 1, self.group))
        packed = self.pack(repeated)[:, 0].reshape(batch, -1, self.block_rows)
        return jnp.pad(packed, [(0, 0), (0, 0), (0, BLOCK_QUERIES - self.block_rows)])

    def unpack(self, packed: jax.Array) -> jax.Array:
        """[B, K, groups, blocks, block_rows, ...] as [B, T, N, ...]."""
        batch, num_kv_heads = packed.shape[:2]
        rest = packed.shape[5:]
        rows = packed.reshape(batch, num_kv_heads, -1, *rest)[:, :, : self.num_packed]
        rows = rows.reshape(batch, num_kv_heads, self.num_queries, self.group, *rest)
        return jnp.moveaxis(rows, 2, 1).reshape(batch, self.num_queries, num_kv_heads * self.group, *rest)


def shared(shape: tuple[int, ...], dtype: Any, most_columns: int | None = None) -> Any:
    """Shared memory for operands of wgmma: tiled, with the widest swizzle that the last axis allows.

    most_columns: of a tile; a right operand's tiles may not have more columns than the product has terms.
    """
    columns = math.gcd(shape[-1], most_columns or shape[-1])
    return plgpu.SMEM(shape, dtype, transforms=tiled(columns, dtype))
