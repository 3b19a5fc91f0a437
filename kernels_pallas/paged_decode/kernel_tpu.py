"""Runs `paged_decode` on TPU: the kernel of `decode/kernel_tpu.py` over pages from tables.

Small pages are adjacent in a block, one copy each; heads that share a table and a page come in one copy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from decodax.kernels_pallas.decode.kernel_tpu import (
    LANES,
    NOT_READ,
    Item,
    Window,
    by_rows,
    decode,
    unsupported_lists,
    unsupported_operands,
)
from decodax.kernels_pallas.decode.new_tokens import NewTokens
from decodax.kernels_pallas.selection import every_reason


def paged_decode(
    query: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    table: jax.Array,
    length: jax.Array,
    new: NewTokens | None,
    *,
    scale: float,
    softcap: float | None,
    first: jax.Array | None,
    num_sink_tokens: int,
    sink_logits: jax.Array | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """See `decodax.kernels_pallas.paged_decode.paged_decode`."""
    _, heads_per_page, page_tokens, _ = key_pages.shape

    def some_rows(
        query: jax.Array, table: jax.Array, length: jax.Array, new: NewTokens | None, first: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        window = Window(page_tokens, length, first, num_sink_tokens)
        return decode(
            query,
            key_pages,
            value_pages,
            new,
            _TablePages(window, table, heads_per_page),
            window.num_pages(),
            num_kv_heads=max(heads_per_page, table.shape[1]),
            scale=scale,
            softcap=softcap,
            first=first,
            num_sink_tokens=num_sink_tokens,
            sink_logits=sink_logits,
            interpret=interpret,
            name="paged_decode",
        )

    return by_rows(table, lambda _, *rows: some_rows(*rows), query, table, length, new, first)


@every_reason
def unsupported_reason(
    query: Any, key_pages: Any, value_pages: Any, table: Any, new: NewTokens | None
) -> Iterator[str | None]:
    """Every reason why the kernel does not support operands of these shapes and dtypes."""
    page_tokens = key_pages.shape[2]
    yield unsupported_operands(query, key_pages, value_pages, new, page_tokens)
    yield unsupported_lists(table)


@dataclass(frozen=True)
class _TablePages:
    window: Window
    table: jax.Array
    heads_per_page: int
    are_in_order: bool = True

    @property
    def page_tokens(self) -> int:
        return self.window.page_tokens

    @property
    def most_pages(self) -> int:
        return self.table.shape[2]

    @property
    def may_be_in_lanes(self) -> bool:
        return self.page_tokens % LANES == 0

    def scalars(self) -> Sequence[jax.Array]:
        return *self.window.scalars(), self.table.reshape(-1).astype(jnp.int32)

    def place(self, scalars: Sequence[Any], item: Item, i: Any) -> tuple[Any, Any, Any]:
        _, num_tables, pages_per_table = self.table.shape
        row = item.row if num_tables == 1 else item.row * num_tables + item.head
        page = scalars[2][row * pages_per_table + self.window.number_of(scalars, item, i)]
        return page, 0 if self.heads_per_page == 1 else item.head, 0

    def num_filled(self, scalars: Sequence[Any], item: Item, i: Any) -> Any:
        start = self.window.number_of(scalars, item, i) * self.page_tokens
        return self.window.length_of(scalars, item) - start

    def slots(self, scalars: Sequence[Any], item: Item, start: Any, block_pages: int) -> jax.Array:
        slot = self.window.slots(scalars, item, start, block_pages)
        return jnp.where(slot < self.window.length_of(scalars, item), slot, NOT_READ)
