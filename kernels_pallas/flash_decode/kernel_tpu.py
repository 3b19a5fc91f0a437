"""Runs `flash_decode` on TPU: the kernel of `decode/kernel_tpu.py` over a contiguous cache in pages of 128 slots."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from decodax.kernels_pallas.decode.kernel_tpu import (
    LANES,
    NOT_READ,
    SUBLANES,
    Item,
    Window,
    decode,
    unsupported_operands,
)
from decodax.kernels_pallas.decode.new_tokens import NewTokens

PAGE_TOKENS = 128


def flash_decode(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
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
    """See `decodax.kernels_pallas.flash_decode.flash_decode`."""
    capacity = key.shape[2]
    window = Window(min(PAGE_TOKENS, capacity), length[:, None], first, num_sink_tokens)
    pages = _ContiguousPages(window, capacity)
    return decode(
        query,
        key,
        value,
        new,
        pages,
        window.num_pages(),
        num_kv_heads=key.shape[1],
        scale=scale,
        softcap=softcap,
        first=first,
        num_sink_tokens=num_sink_tokens,
        sink_logits=sink_logits,
        interpret=interpret,
        name="flash_decode",
    )


def unsupported_reason(query: Any, key: Any, value: Any, new: NewTokens | None) -> str | None:
    """Why the kernel does not support operands of these shapes and dtypes; None if it does."""
    capacity = key.shape[2]
    # A cache of one page is copied completely, whatever its size.
    multiple = 0 if capacity <= PAGE_TOKENS else capacity
    return unsupported_operands(query, key, value, new, multiple)


@dataclass(frozen=True)
class _ContiguousPages:
    """A last page that does not fit starts earlier, so that it ends with the cache, and masks the overlap."""

    window: Window
    capacity: int
    are_in_order: bool = True

    @property
    def page_tokens(self) -> int:
        return self.window.page_tokens

    @property
    def most_pages(self) -> int:
        return -(-self.capacity // self.page_tokens)

    @property
    def may_be_in_lanes(self) -> bool:
        return self.capacity % LANES == 0

    def scalars(self) -> Sequence[jax.Array]:
        return self.window.scalars()

    def place(self, scalars: Sequence[Any], item: Item, i: Any) -> tuple[Any, Any, Any]:
        return item.row, item.head, self._start(scalars, item, i)

    def num_filled(self, scalars: Sequence[Any], item: Item, i: Any) -> Any:
        return self.window.length_of(scalars, item) - self._start(scalars, item, i)

    def slots(self, scalars: Sequence[Any], item: Item, start: Any, block_pages: int) -> jax.Array:
        slot = self.window.slots(scalars, item, start, block_pages)
        if overlap := -self.capacity % self.page_tokens:
            last_start = self.capacity + overlap - self.page_tokens
            is_last = slot >= last_start
            slot = jnp.where(is_last, slot - overlap, slot)
            slot = jnp.where(is_last & (slot < last_start), NOT_READ, slot)
        return jnp.where(slot < self.window.length_of(scalars, item), slot, NOT_READ)

    def _start(self, scalars: Sequence[Any], item: Item, i: Any) -> Any:
        start = self.window.number_of(scalars, item, i) * self.page_tokens
        if self.capacity <= self.page_tokens:
            return 0
        multiple = SUBLANES if self.capacity % self.page_tokens else self.page_tokens
        return pl.multiple_of(jnp.minimum(start, self.capacity - self.page_tokens), multiple)
