"""Checks the shape and the kind of an array that a part from outside gives, while a function is traced."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from decodax.core.arguments import shown


def check_array(what: str, array: Any, shape: tuple[int | None, ...], kind: Any, meaning: str = "") -> None:
    """Raises ValueError where it is no array of this shape and kind of numbers.

    what: its name, for the message.
    array: a whole number of Python is an integer array of shape ().
    shape: None for a dimension of any size.
    kind: a dtype or a group of them (`jnp.integer`).
    meaning: of the dimensions, for the message.
    """
    is_number = isinstance(array, int) and not isinstance(array, bool)
    given: Any = np.asarray(array, np.int32) if is_number else array
    found: tuple[Any, ...] | None = getattr(given, "shape", None)
    fits = found is not None and len(found) == len(shape)
    fits = fits and all(size in (None, own) for size, own in zip(shape, found or (), strict=True))
    if fits and jnp.issubdtype(given.dtype, kind):
        return
    sizes = str(tuple("any" if size is None else size for size in shape)).replace("'", "")
    described = shown(array) if found is None else f"{given.dtype} of shape {tuple(found)}"
    raise ValueError(f"{what} must be {kind.__name__} of shape {sizes}{meaning and f' ({meaning})'}, got {described}")
