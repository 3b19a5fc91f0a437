"""Attention masks: which keys each query attends to, without a dense [T, S] array unless one is asked for on a tile.

A mask is a small frozen object. It answers for any tile of queries and keys (`allows`), so an implementation that loops
over blocks of the cache asks block by block, and a kernel may read its fields instead. Masks combine with `&`.

Whether a cached slot is filled is the cache's business, not the mask's.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from decodax.core import pytree


@pytree.dataclass
class Tokens:
    """Positions of consecutive tokens.

    position: of each token.
    is_new: whether they are of this forward, and not in the cache.
    first: the index of the first of them among the new ones; an implementation may ask tile by tile.
    """

    position: Int[Array, "B T"]
    is_new: bool = pytree.static()
    first: int = pytree.static(default=0)

    def of(self, per_token: Array, axis: int) -> Array:
        """Of an array over all new tokens, the entries of these."""
        return jax.lax.slice_in_dim(per_token, self.first, self.first + self.position.shape[1], axis=axis)


@dataclass(frozen=True)
class Span:
    """A query attends to all keys up to its own position, or to the last `window` of them (itself included)."""

    window: int | None


class Mask:
    """The contract: which keys a query attends to, and the first position that any query attends to."""

    @property
    def attends_ahead(self) -> bool:
        """Whether a new token may attend to one after it among the new ones, as in an encoder or a block of an image.

        Where it says no, keys after a query are not even read; recurrent layers and the invariant mode need a no.
        """
        return True

    def span(self, *, is_new: bool) -> Span | None:
        """The span of the queries over the new tokens, or over those in the cache; None if a span does not say it all.

        Of new tokens only where they are a chain, each one position after the one before it.
        """
        return None

    def allows(self, query: Tokens, key: Tokens) -> Bool[Array, "#B T S"]:
        raise NotImplementedError

    def first_visible(self, position: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """No key before this position is allowed, so an implementation need not read it."""
        return jnp.zeros_like(position)

    def __and__(self, other: "Mask") -> "Both":
        return Both(self, other)


@pytree.dataclass
class Causal(Mask):
    """A query attends to keys at its own position and before: the mask of a chain."""

    @property
    def attends_ahead(self) -> bool:
        return False

    def span(self, *, is_new: bool) -> Span | None:
        return Span(None)

    def allows(self, query: Tokens, key: Tokens) -> Bool[Array, "B T S"]:
        return key.position[:, None, :] <= query.position[:, :, None]


@pytree.dataclass
class Window(Mask):
    """A query attends only to the last `size` positions, its own included (Mistral, arXiv 2310.06825)."""

    size: int = pytree.static()

    @property
    def attends_ahead(self) -> bool:
        return False

    def span(self, *, is_new: bool) -> Span | None:
        return Span(self.size)

    def allows(self, query: Tokens, key: Tokens) -> Bool[Array, "B T S"]:
        distance = query.position[:, :, None] - key.position[:, None, :]
        return (distance >= 0) & (distance < self.size)

    def first_visible(self, position: Int[Array, "B T"]) -> Int[Array, "B T"]:
        return position - self.size + 1


@pytree.dataclass
class Ancestors(Mask):
    """A token tree: among the new tokens a query attends to itself and its ancestors; cached tokens are ancestors.

    A node comes after its ancestors, so no token attends to a later one. SpecInfer, arXiv 2305.09781.

    allowed: whether token i of this forward attends to new token j (true for i = j); tokens staged before this forward
        are the first of the U new ones.
    """

    allowed: Bool[Array, "#B T U"]

    @property
    def attends_ahead(self) -> bool:
        return False

    @classmethod
    def from_parents(cls, parent: Int[Array, "#B T"]) -> "Ancestors":
        """The mask of trees given as parent indices, a root's parent being -1; parents precede their children."""
        num_tokens = parent.shape[1]
        one_up = parent[:, :, None] == jnp.arange(num_tokens, dtype=parent.dtype)[None, None, :]
        reach = one_up | jnp.eye(num_tokens, dtype=bool)[None]
        for _ in range((num_tokens - 1).bit_length()):  # paths of 1, 2, 4, ... steps
            counts = reach.astype(jnp.float32)
            reach = jnp.einsum("bij,bjk->bik", counts, counts) > 0
        return cls(reach)

    def span(self, *, is_new: bool) -> Span | None:
        return None if is_new else Span(None)

    def allows(self, query: Tokens, key: Tokens) -> Bool[Array, "#B T S"]:
        if key.is_new:
            return key.of(query.of(self.allowed, axis=1), axis=2)
        return jnp.ones((1, query.position.shape[1], key.position.shape[1]), bool)


@pytree.dataclass
class Both(Mask):
    """Allowed by both masks."""

    left: Mask
    right: Mask

    @property
    def attends_ahead(self) -> bool:
        return self.left.attends_ahead and self.right.attends_ahead

    def span(self, *, is_new: bool) -> Span | None:
        spans = [mask.span(is_new=is_new) for mask in (self.left, self.right)]
        if None in spans:
            return None
        return Span(min((span.window for span in spans if span and span.window is not None), default=None))

    def allows(self, query: Tokens, key: Tokens) -> Bool[Array, "#B T S"]:
        return self.left.allows(query, key) & self.right.allows(query, key)

    def first_visible(self, position: Int[Array, "B T"]) -> Int[Array, "B T"]:
        return jnp.maximum(self.left.first_visible(position), self.right.first_visible(position))
