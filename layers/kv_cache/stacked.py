"""Stacks the caches, or cache updates, of the layers at one place of all pipeline chunks.

The arrays have a first axis of layers, and a device has those of its own stage. `commit` and `place` treat a stack as
one cache, or one layer's update, like any other.
"""

from typing import Any

import jax
from jaxtyping import Array, Int

from decodax.core import pytree


@pytree.dataclass
class Stacked:
    """A stack of caches or cache updates.

    each: a cache or the cache update of a forward (the same class for all), every array with a first axis of layers.
    """

    each: Any = pytree.stacked("L")

    @property
    def length(self) -> Int[Array, " B"]:
        """Of a cache: tokens written so far, the same number in all layers."""
        return lengths_of(self.each)[0]

    @property
    def capacity(self) -> int:
        """Of a cache: slots in each row."""
        return first_of(self.each).capacity

    @property
    def marks_tokens(self) -> bool:
        """Of a cache: whether it may hold marks of tokens for which its layer did not run (`MarksTokens`)."""
        return getattr(self.each, "marks_tokens", False)

    def empty_like(self) -> "Stacked":
        """Of caches: empty ones of the same form."""
        return Stacked(jax.vmap(lambda cache: cache.empty_like())(self.each))

    def commit(self, update: "Stacked", count: Int[Array, " B"], path: Int[Array, "B A"] | None = None) -> "Stacked":
        """Every layer's cache after its own `commit` of its update."""
        return Stacked(jax.vmap(lambda cache, new: cache.commit(new, count, path))(self.each, update.each))

    def place(self, new: "Stacked", slot: Int[Array, " T"]) -> "Stacked":
        """Every layer's staged tokens with new ones at the given slots (see staged.py)."""
        return Stacked(jax.vmap(lambda staged, fresh: staged.place(fresh, slot))(self.each, new.each))


def lengths_of(stack: Any) -> Int[Array, "L B"]:
    """The tokens in each row of each cache of a stack."""
    return jax.vmap(lambda cache: cache.length)(stack)


def first_of(stack: Any) -> Any:
    """The first of a stack, as shapes."""
    return jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], stack))
