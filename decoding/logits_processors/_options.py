"""Reads one sampling option, a number or one number per row, into one checked value per row (on the host)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

Option = int | float | np.number | Sequence[int | float | None] | np.ndarray | jax.Array | None


def per_row(
    name: str,
    option: Any,
    *,
    batch_size: int,
    neutral: int | float,
    is_valid: Callable[[np.ndarray], np.ndarray],
    expected: str,
    whole: bool = False,
) -> np.ndarray:
    """`option` as `batch_size` values, float32, or int32 where it must be `whole`; None is the `neutral` value.

    Values are checked as they are after rounding to float32, where what is below the smallest normal number is 0, as it
    is to most processors: a probability of 1e-40 is refused like 0. Raises ValueError naming the option, what is
    `expected`, and the value and row that broke it.
    """
    if hasattr(option, "ndim"):  # NumPy and JAX, 0-dimensional scalars included
        option = np.asarray(option).tolist()
    is_per_row = isinstance(option, Sequence) and not isinstance(option, str | bytes)
    values: list[Any] = list(option) if is_per_row else [option] * batch_size
    if len(values) != batch_size:
        raise ValueError(f"{name} must be one number, or one per row ({batch_size} rows), got {len(values)} numbers")

    rows = np.zeros(batch_size, np.int32 if whole else np.float32)
    for row, value in enumerate(values):
        value = neutral if value is None else value
        is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if is_number and whole:
            is_number = abs(value) < 2**31 and value == int(value)
        if is_number:
            with np.errstate(over="ignore"):
                rows[row] = value if abs(value) >= np.finfo(np.float32).tiny or np.isnan(value) else 0
        if not is_number or not is_valid(rows[row]):
            raise ValueError(f"{name} must be {expected}, got {value!r}" + (f" in row {row}" if is_per_row else ""))
    return rows
