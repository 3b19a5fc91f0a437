"""What pipeline stages hold for one place of their chunks of layers: the caches, or the rows, of several layers.

The arrays have an axis of layers in front, and a device has those of its own stage. To whoever commits or stages, a
stack is one cache, or one layer's rows, like any other.
"""

from typing import Any

import jax
from jaxtyping import Array, Int

from decodax.layers import pytree


@pytree.dataclass
class Stacked:
    """`each`: a cache or the rows of a forward (the same class for all), every array with the layers in front."""

    each: Any = pytree.stacked("L")

    @property
    def length(self) -> Int[Array, " B"]:
        """Of a cache: tokens written so far, of which all layers have the same number."""
        return lengths_of(self.each)[0]

    @property
    def capacity(self) -> int:
        """Of a cache: slots in each row."""
        return first_of(self.each).capacity

    @property
    def marks_tokens(self) -> bool:
        """Of a cache: whether it may know of tokens for which its layer did not run (`MarksTokens`)."""
        return getattr(self.each, "marks_tokens", False)

    def commit(self, rows: "Stacked", count: Int[Array, " B"], path: Int[Array, "B A"] | None = None) -> "Stacked":
        """Every layer's cache with its rows, as its own `commit` writes them."""
        return Stacked(jax.vmap(lambda cache, new: cache.commit(new, count, path))(self.each, rows.each))

    def place(self, new: "Stacked", slot: Int[Array, " T"]) -> "Stacked":
        """Every layer's staged rows with new ones at the given slots (see staged.py)."""
        return Stacked(jax.vmap(lambda staged, fresh: staged.place(fresh, slot))(self.each, new.each))


def lengths_of(stack: Any) -> Int[Array, "L B"]:
    """Of a stack of caches: the tokens in each row."""
    return jax.vmap(lambda cache: cache.length)(stack)


def first_of(stack: Any) -> Any:
    """The first of a stack, as shapes."""
    return jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], stack))
