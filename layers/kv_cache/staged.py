"""A cache together with tokens that are in none yet: what a drafter's next forward reads while its draft is open.

A draft grows token by token, or level by level, and each forward has to read the rows of those before it. They must
not enter the cache, as the target may reject them; so they are staged beside it. Attention treats staged tokens as new
ones that stand before the tokens of this forward: the mask decides who reads them. Once the target has decided, the
accepted ones are committed like any others.
"""

from typing import Any

from jaxtyping import Array, Int

from decodax.layers import pytree


@pytree.dataclass
class Staged:
    """`rows` of U uncommitted tokens at `position`, behind those of `cache`; the mask hides slots not yet filled.

    Both are what this layer keeps (`Mixer.empty_cache`, `Mixer.empty_rows`). Without a cache nothing precedes them.
    """

    cache: Any
    rows: Any
    position: Int[Array, "B U"]


def unstaged(cache: Any) -> Any:
    """The cache itself, without what is staged beside it."""
    return cache.cache if isinstance(cache, Staged) else cache


def num_staged(cache: Any) -> int:
    """How many tokens are staged beside a cache."""
    return cache.position.shape[1] if isinstance(cache, Staged) else 0


def stage(caches: tuple[Any, ...], rows: tuple[Any, ...], position: Int[Array, "B U"]) -> tuple[Staged, ...]:
    """Every layer's cache with its staged rows."""
    return tuple(Staged(cache, staged, position) for cache, staged in zip(caches, rows, strict=True))


def place(rows: tuple[Any, ...], new: tuple[Any, ...], slot: Int[Array, " T"]) -> tuple[Any, ...]:
    """Every layer's staged rows with those of a forward written to `slot`; a slot beyond the buffer is dropped."""
    return tuple(staged.place(fresh, slot) for staged, fresh in zip(rows, new, strict=True))
