"""Lists named real shapes of block-sparse prefill, for tests and benchmarks: operands, bytes and operations."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decodax.kernels_pallas.block_sparse_prefill.lists import BlockLists


@dataclass(frozen=True)
class BlockSparseShape:
    """A prompt (or its last chunk), and the number of blocks that each query block lists.

    A query block lists always the blocks on its diagonal and the first block, the others at random.

    num_tokens: queries per row.
    num_heads, num_kv_heads, num_lists: query heads, key-value heads, sets of lists.
    head_size, value_size: numbers per key and value; value_size None: the head size.
    fraction: listed share of the blocks that are not masked.
    most: upper limit of blocks per list.
    batch: rows.
    offset: tokens in the cache before the first query.
    query_block, key_block: tokens per block.
    softcap, dtype: of the scores, of the operands.
    """

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_lists: int
    fraction: float = 1.0
    most: int | None = None
    batch: int = 1
    offset: int = 0
    query_block: int = 128
    key_block: int = 128
    value_size: int | None = None
    softcap: float | None = None
    dtype: Any = jnp.bfloat16

    @property
    def capacity(self) -> int:
        return self.offset + self.num_tokens

    def operands(self) -> dict[str, Any]:
        """The arrays of a call, as shapes."""
        return jax.eval_shape(lambda: self._operands(jnp.zeros, self._no_lists()))

    def random_operands(self, seed: int) -> dict[str, Any]:
        """The arrays of a call."""
        numbers = np.random.default_rng(seed)
        sources = iter(jax.random.split(jax.random.key(seed), 3))
        lists = self._random_lists(numbers)
        return self._operands(lambda shape, dtype: jax.random.normal(next(sources), shape, dtype), lists)

    def options(self) -> dict[str, Any]:
        """The rest of a call."""
        return {"scale": 1 / math.sqrt(self.head_size), "softcap": self.softcap}

    def blocks_listed(self) -> int:
        """Number of blocks in all lists."""
        return self.batch * self.num_lists * sum(self._num_listed(block) for block in range(self._num_query_blocks))

    def bytes_moved(self) -> int:
        """The fewest bytes: each array once. A chip without a cache moves `bytes_listed` of keys and values instead."""
        token = self.batch * np.dtype(self.dtype).itemsize * (self.head_size + self._value_size)
        lse = 4 * self.batch * self.num_tokens * self.num_heads
        lists = 4 * (self.blocks_listed() + self.batch * self.num_lists * (self._num_query_blocks + 1))
        return token * (self.num_tokens * self.num_heads + self.capacity * self.num_kv_heads) + lse + lists

    def bytes_listed(self) -> int:
        """Bytes of keys and values if every set of lists loads its own blocks."""
        token = np.dtype(self.dtype).itemsize * (self.head_size + self._value_size)
        return self.blocks_listed() * self.key_block * token

    def flops(self) -> int:
        """Operations of the products of queries with unmasked keys, and of weights with values."""
        pairs = 0
        for block in range(self._num_query_blocks):
            queries = min(self.query_block, self.num_tokens - block * self.query_block)
            num_ahead = self._num_attended(block) * self.key_block - self.offset - block * self.query_block
            masked = sum(num_ahead - 1 - query for query in range(queries))
            pairs += self._num_listed(block) * queries * self.key_block - masked
        return 2 * (self.head_size + self._value_size) * self.batch * self.num_heads * pairs

    @property
    def _value_size(self) -> int:
        return self.value_size or self.head_size

    @property
    def _num_query_blocks(self) -> int:
        return -(-self.num_tokens // self.query_block)

    def _num_attended(self, block: int) -> int:
        """Blocks of keys that a block of queries may attend to, fully or partially."""
        return -(-min(self.offset + (block + 1) * self.query_block, self.capacity) // self.key_block)

    def _num_diagonal(self, block: int) -> int:
        """Those among them that are partially masked: the last ones."""
        return self._num_attended(block) - (self.offset + block * self.query_block + 1) // self.key_block

    def _num_listed(self, block: int) -> int:
        attended = self._num_attended(block)
        target = min(math.ceil(self.fraction * attended), self.most or attended)
        return min(max(target, self._num_diagonal(block) + 1), attended)

    def _operands(self, array: Any, lists: BlockLists) -> dict[str, Any]:
        keys = (self.batch, self.num_kv_heads, self.capacity)
        return {
            "query": array((self.batch, self.num_tokens, self.num_heads, self.head_size), self.dtype),
            "key": array((*keys, self.head_size), self.dtype),
            "value": array((*keys, self._value_size), self.dtype),
            "blocks": lists,
            "offset": jnp.full(self.batch, self.offset, jnp.int32),
            "length": jnp.full(self.batch, self.capacity, jnp.int32),
        }

    def _no_lists(self) -> BlockLists:
        sets = (self.batch, self.num_lists)
        num_entries = self.blocks_listed() // (self.batch * self.num_lists)
        start = jnp.zeros((*sets, self._num_query_blocks + 1), jnp.int32)
        return BlockLists(start, jnp.zeros((*sets, num_entries), jnp.int32), self.query_block, self.key_block)

    def _random_lists(self, numbers: np.random.Generator) -> BlockLists:
        sets = (self.batch, self.num_lists)
        listed = []
        for block in range(self._num_query_blocks):
            rank = numbers.random((*sets, self._num_attended(block)))
            rank[..., 0] = rank[..., rank.shape[2] - self._num_diagonal(block) :] = -1  # listed before all others
            listed.append(np.sort(np.argsort(rank, axis=2)[..., : self._num_listed(block)], axis=2))
        start = np.cumsum([0] + [blocks.shape[2] for blocks in listed])
        start = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (*sets, len(start)))
        index = jnp.asarray(np.concatenate(listed, axis=2), jnp.int32)
        return BlockLists(start, index, self.query_block, self.key_block)


SHAPES = {
    "llama3-8b, 64k, 10 % of the blocks": BlockSparseShape(65536, 32, 8, 128, num_lists=32, fraction=0.1),
    "llama3-8b, 64k, 10 % of the blocks, a list per group": BlockSparseShape(
        65536, 32, 8, 128, num_lists=8, fraction=0.1
    ),
    "llama3-8b, 64k, all blocks": BlockSparseShape(65536, 32, 8, 128, num_lists=32),
    "llama3-8b, 128k, 100 blocks of 64 (MInference)": BlockSparseShape(
        131072, 32, 8, 128, num_lists=32, most=100, query_block=64, key_block=64
    ),
    "qwen2.5-7b, 8k after 24k, batch 2, a list per group": BlockSparseShape(
        8192, 28, 4, 128, num_lists=4, fraction=0.2, batch=2, offset=24576, query_block=64
    ),
    "llama3-8b, 2k after 126k, 10 % of the blocks": BlockSparseShape(
        2048, 32, 8, 128, num_lists=32, fraction=0.1, offset=129024
    ),
    "gemma2-9b, 8k": BlockSparseShape(8192, 16, 8, 256, num_lists=16, fraction=0.25, softcap=50.0),
    "phi3-mini, 16k": BlockSparseShape(16384, 32, 32, 96, num_lists=32, fraction=0.2),
    "deepseek-v2-lite, 32k, keys of 192": BlockSparseShape(
        32768, 16, 16, 192, num_lists=16, fraction=0.1, value_size=128
    ),
}
