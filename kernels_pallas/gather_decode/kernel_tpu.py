"""Runs `gather_decode` on TPU: the kernel of `decode/kernel_tpu.py` over pages from lists.

A page is one copy, so pages are as large as a tile of memory or larger; single tokens are left to XLA.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from decodax.kernels_pallas.decode.kernel_tpu import (
    LANES,
    NOT_READ,
    Item,
    by_rows,
    decode,
    divided,
    unsupported_lists,
    unsupported_operands,
)
from decodax.kernels_pallas.decode.new_tokens import NewTokens
from decodax.kernels_pallas.selection import every_reason


def gather_decode(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    index: jax.Array,
    count: jax.Array,
    length: jax.Array,
    new: NewTokens | None,
    *,
    block_tokens: int,
    scale: float,
    softcap: float | None,
    sink_logits: jax.Array | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """See `decodax.kernels_pallas.gather_decode.gather_decode`."""

    def some_rows(
        first_row: int,
        query: jax.Array,
        index: jax.Array,
        count: jax.Array,
        length: jax.Array,
        new: NewTokens | None,
    ) -> tuple[jax.Array, jax.Array]:
        return decode(
            query,
            key,
            value,
            new,
            _ListedPages(block_tokens, index, count, length, first_row, key.shape[2]),
            count,
            num_kv_heads=key.shape[1],
            scale=scale,
            softcap=softcap,
            first=None,
            num_sink_tokens=0,
            sink_logits=sink_logits,
            interpret=interpret,
            name="gather_decode",
        )

    return by_rows(index, some_rows, query, index, count, length, new)


@every_reason
def unsupported_reason(
    query: Any, key: Any, value: Any, index: Any, new: NewTokens | None, *, block_tokens: int
) -> Iterator[str | None]:
    """Every reason why the kernel does not support operands of these shapes and dtypes."""
    yield unsupported_operands(query, key, value, new, block_tokens)
    yield unsupported_lists(index)


@dataclass(frozen=True)
class _ListedPages:
    page_tokens: int
    index: jax.Array  # [B, K, M]
    count: jax.Array  # [B, K]
    length: jax.Array  # [B]
    first_row: int  # of the cache: where the rows of the lists start
    capacity: int
    are_in_order: bool = False

    @property
    def most_pages(self) -> int:
        return self.index.shape[2]

    @property
    def may_be_in_lanes(self) -> bool:
        return self.page_tokens % LANES == 0 and self.capacity % LANES == 0

    def scalars(self) -> Sequence[jax.Array]:
        return tuple(x.reshape(-1).astype(jnp.int32) for x in (self.count, self.length, self.index))

    def _listed(self, scalars: Sequence[Any], item: Item, i: Any) -> Any:
        """The first slot of the i-th page in the list."""
        _, num_heads, num_listed = self.index.shape
        entry = jnp.minimum(i, num_listed - 1)
        return scalars[2][(item.row * num_heads + item.head) * num_listed + entry] * self.page_tokens

    def place(self, scalars: Sequence[Any], item: Item, i: Any) -> tuple[Any, Any, Any]:
        start = pl.multiple_of(self._listed(scalars, item, i), self.page_tokens)
        return item.row + self.first_row, item.head, start

    def num_filled(self, scalars: Sequence[Any], item: Item, i: Any) -> Any:
        return scalars[1][item.row] - self._listed(scalars, item, i)

    def slots(self, scalars: Sequence[Any], item: Item, start: Any, block_pages: int) -> jax.Array:
        token = jax.lax.broadcasted_iota(jnp.int32, (1, block_pages * self.page_tokens), 1)
        page, offset = divided(token, self.page_tokens)
        slot = jnp.full(token.shape, NOT_READ, jnp.int32)
        count = scalars[0][item.row * self.index.shape[1] + item.head]
        for i in range(block_pages):
            listed = jnp.where(start + i < count, self._listed(scalars, item, start + i), NOT_READ)
            slot = jnp.where(page == i, listed + offset, slot)
        return jnp.where(slot < scalars[1][item.row], slot, NOT_READ)
