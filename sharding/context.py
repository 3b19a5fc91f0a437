"""How the new tokens of a prompt that is split over devices read each other: by `ring` or by `ulysses`.

Both give the same. Which of them sends less follows from sizes that are known when a program is compiled, and decides
where nobody asks for one. With q, kv and o numbers of a token's queries, keys and values, and results, a device sends
for each of its tokens

    ring, n devices         (n - 1) kv + q + kv + o        the last three for zigzag order and back
    ring, window            (s - 1) kv                     where a window lets it end after s devices
    Ulysses                 (q + c kv + o) (n - 1) / n     c copies of key-value heads

So Ulysses sends less wherever heads divide, unless a narrow window keeps the ring short; the ring takes all else. A
ring hides what it sends behind its products, and an all-to-all does not, so where links are fast for the model it may
be worth asking for.
"""

from typing import Literal, get_args

from decodax.sharding.ring import is_zigzag, num_steps
from decodax.sharding.ulysses import num_copies

Way = Literal["ring", "ulysses"]


def choose_way(
    asked: str | None,
    *,
    num_tokens: int,
    num_devices: int,
    num_heads: int,
    num_kv_heads: int,
    query_size: int,
    kv_size: int,
    result_size: int,
    window: int | None,
) -> Way:
    """The way that was asked for, or the one that sends less for these sizes.

    num_tokens, num_heads and num_kv_heads are those of a device. Sizes are per head, kv_size that of a key and a value.

    Raises ValueError for a way that does not exist.
    """
    for way in get_args(Way):
        if asked == way:
            return way
    if asked is not None:
        raise ValueError(f"context must be one of {', '.join(get_args(Way))} or None, got {asked!r}")
    copies = num_copies(num_heads, num_kv_heads, num_devices)
    if copies is None:
        return "ring"
    query, key_value, result = num_heads * query_size, num_kv_heads * kv_size, num_heads * result_size
    by_ring = (num_steps(num_tokens, num_devices, window) - 1) * key_value
    if is_zigzag(num_tokens, num_devices, window):
        by_ring += query + key_value + result
    by_ulysses = (query + copies * key_value + result) * (num_devices - 1) / num_devices
    return "ring" if by_ring < by_ulysses else "ulysses"
