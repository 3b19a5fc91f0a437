"""Takes tokens out of cache updates, whatever arrays they have; all in NumPy."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


def token_axes(empty_update: Callable[[int], Any]) -> Any:
    """The axis of the tokens in each array of an update: the one whose size is that of the update.

    empty_update: makes an update of so many tokens.
    """
    few, more = (jax.eval_shape(lambda size=size: empty_update(size)) for size in (2, 3))

    def axis(one: Any, other: Any) -> int:
        (found,) = (i for i, sizes in enumerate(zip(one.shape, other.shape, strict=True)) if sizes == (2, 3))
        return found

    return jax.tree.map(axis, few, more)


def tokens_of_row(update: Any, axes: Any, row: int, indices: Sequence[int]) -> Any:
    """Some tokens of one row: arrays whose first axis is that of the tokens."""
    return jax.tree.map(lambda leaf, axis: np.moveaxis(np.asarray(leaf)[row], axis - 1, 0)[indices], update, axes)


def update_of_rows(rows: Sequence[Any], axes: Any) -> Any:
    """The update with these tokens in its rows, each as `tokens_of_row` gives them."""
    return jax.tree.map(lambda axis, *leaves: np.moveaxis(np.stack(leaves), 1, axis), axes, *rows)


def concatenated(tokens: Sequence[Any]) -> Any:
    """One row's tokens after each other."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *tokens)
