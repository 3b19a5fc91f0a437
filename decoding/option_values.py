"""Reads one sampling option, a number or one number per row, into one checked value per row (on the host)."""

from collections.abc import Callable
from typing import Any

import numpy as np

from decodax.core.arguments import in_order, is_number, is_whole, plain, refusal

_MOST = 2**31 - 1  # a whole number beyond it is cut to it: no row has as many tokens, no vocabulary as many entries
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


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
    values = in_order(option)
    is_per_row = values is not None
    values = [plain(option)] * batch_size if values is None else values
    if len(values) != batch_size:
        raise ValueError(f"{name} must be one number, or one per row ({batch_size} rows), got {len(values)} numbers")

    rows = np.zeros(batch_size, np.int32 if whole else np.float32)
    for row, value in enumerate(values):
        value = neutral if value is None else value
        is_readable = is_whole(value) if whole else is_number(value)
        if is_readable:
            rows[row] = max(-_MOST, min(int(value), _MOST)) if whole else to_float32(value)
        if not is_readable or not is_valid(rows[row]):
            raise refusal(name, expected, value, f" in row {row}" if is_per_row else "")
    return rows


def to_float32(value: Any) -> np.float32:
    """The nearest float32, infinite beyond the largest; 0 below the smallest normal number."""
    try:
        number = float(value)
    except OverflowError:  # an int beyond the largest float
        number = float("inf") if value > 0 else float("-inf")
    if abs(number) < _SMALLEST_NORMAL:
        return np.float32(0)
    with np.errstate(over="ignore"):
        return np.float32(number)
