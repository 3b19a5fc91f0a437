"""Stages draft tokens beside a cache: the next forward of a drafter attends to them, and the cache does not hold them.

A draft grows token by token, or level by level, and each forward has to attend to the keys and values of the draft
tokens before it. They must not enter the cache, as the target model may reject them; so they are staged beside it.
Attention treats staged tokens as new ones before the tokens of this forward: the mask decides which queries attend to
them. After verification, the accepted ones are committed like any others.
"""

from typing import Any

from jaxtyping import Array, Int

from decodax.core import pytree


@pytree.dataclass
class Staged:
    """A cache with uncommitted tokens after it; the mask excludes slots not yet filled.

    cache: of the layer (`Mixer.empty_cache`), None where nothing precedes the tokens.
    update: of the U tokens (`Mixer.empty_update`).
    position: of the U tokens.
    """

    cache: Any
    update: Any
    position: Int[Array, "B U"]


def stage(caches: tuple[Any, ...], update: tuple[Any, ...], position: Int[Array, "B U"]) -> tuple[Staged, ...]:
    """Every layer's cache with its staged tokens."""
    return tuple(Staged(cache, staged, position) for cache, staged in zip(caches, update, strict=True))


def place(update: tuple[Any, ...], new: tuple[Any, ...], slot: Int[Array, " T"]) -> tuple[Any, ...]:
    """Every layer's staged tokens with those of a forward written to `slot`; a slot beyond the buffer is dropped."""
    return tuple(staged.place(fresh, slot) for staged, fresh in zip(update, new, strict=True))
