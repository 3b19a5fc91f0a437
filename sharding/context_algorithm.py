"""Selects the context-parallel attention algorithm for a prompt that is split over devices: `ring` or `ulysses`.

Both give the same result. The sizes known at compile time say which one sends less, and that one is the default. With
q, kv and o the numbers of a token's queries, keys and values, and outputs, a device sends for each of its tokens

    ring, n devices         (n - 1) kv + q + kv + o        the last three to zigzag order and back
    ring, window            (s - 1) kv                     a window ends the ring after s devices
    Ulysses                 (q + c kv + o) (n - 1) / n     c copies of key-value heads

So Ulysses sends less wherever heads divide, unless a narrow window keeps the ring short; the ring handles all other
cases. A ring overlaps its permutes with its products, and an all-to-all does not, so with links that are fast for the
model it may be worth requesting the ring.
"""

from typing import Literal, get_args

from decodax.sharding.ring import is_zigzag, num_steps
from decodax.sharding.ulysses import num_copies

ContextAlgorithm = Literal["ring", "ulysses"]


def select_context_algorithm(
    requested: str | None,
    *,
    num_tokens: int,
    num_devices: int,
    num_heads: int,
    num_kv_heads: int,
    query_size: int,
    kv_size: int,
    result_size: int,
    window: int | None,
) -> ContextAlgorithm:
    """The algorithm that was requested, or the one that sends less for these sizes.

    requested: "ring", "ulysses", or None.
    num_tokens: new tokens on each device.
    num_devices: over which tokens are split.
    num_heads: query heads on each device.
    num_kv_heads: key-value heads on each device.
    query_size: numbers of a query head.
    kv_size: numbers of a key head and a value head together.
    result_size: numbers of an output head.
    window: tokens that a query attends to at most, None for all.
    Raises ValueError for an algorithm that does not exist.
    """
    for algorithm in get_args(ContextAlgorithm):
        if requested == algorithm:
            return algorithm
    if requested is not None:
        raise ValueError(f"context must be one of {', '.join(get_args(ContextAlgorithm))} or None, got {requested!r}")
    copies = num_copies(num_heads, num_kv_heads, num_devices)
    if copies is None:
        return "ring"
    query, key_value, result = num_heads * query_size, num_kv_heads * kv_size, num_heads * result_size
    by_ring = (num_steps(num_tokens, num_devices, window) - 1) * key_value
    if is_zigzag(num_tokens, num_devices, window):
        by_ring += query + key_value + result
    by_ulysses = (query + copies * key_value + result) * (num_devices - 1) / num_devices
    return "ring" if by_ring < by_ulysses else "ulysses"
