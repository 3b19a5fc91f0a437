"""Gives a mixer one view of what precedes its tokens, whatever that is: it passes the view on, or asks for a part.

A view is None (nothing), a cache, a cache with staged tokens beside it (`Staged`), the rows of a micro-batch
(`MicroBatchCache`), or in the invariant mode a `Tile`. `attend` takes any of them.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Int

from decodax.layers.attention.attend_invariant import Tile
from decodax.layers.kv_cache.staged import Staged

CacheView = Any


def committed(view: CacheView) -> Any:
    """The cache of the committed tokens; None where there are none. Raises ValueError in the invariant mode."""
    if isinstance(view, Tile):
        raise ValueError(
            "a layer that asks for parts of its cache has no invariant mode: its `invariant_unsupported_reason` must "
            "say so; use invariant=False"
        )
    return view.cache if isinstance(view, Staged) else view


def staged_tokens(view: CacheView) -> tuple[Any, Int[Array, "B U"]] | None:
    """The cache update of the tokens staged beside the cache, with their positions; None where there are none."""
    return (view.update, view.position) if isinstance(view, Staged) else None


def part(view: CacheView, of_cache: Callable[[Any], Any], of_update: Callable[[Any], Any]) -> CacheView:
    """The view of a part of the cache, as of the keys and values of a cache that holds more.

    of_cache, of_update: the part of a cache, and of a cache update.
    """
    cache, staged = committed(view), staged_tokens(view)
    bare = None if cache is None else of_cache(cache)
    return bare if staged is None else Staged(bare, of_update(staged[0]), staged[1])


def num_staged(view: CacheView) -> int:
    """The number of tokens staged beside the cache."""
    return view.position.shape[1] if isinstance(view, Staged) else 0
