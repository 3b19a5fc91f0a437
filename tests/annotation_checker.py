"""Checks the annotations of every decodax function in tests: beartype, by the rules of static type checkers.

The functions of `decodax.api` are left alone: they check what users pass themselves, and tests look at their errors.

An int is accepted for a float, and `Self` is allowed: jaxtyping's import hook decorates methods one by one, before
their class exists, where beartype refuses it. `Self` alone is not checked; all else in the same signature is.
"""

from collections.abc import Callable
from typing import Any, Self

from beartype import BeartypeConf, beartype

_as_type_checkers = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, raising where an argument or the result is not what its annotation says."""
    if function.__module__ == "decodax.api":
        return function
    annotations = getattr(function, "__annotations__", {})
    if Self in annotations.values():
        function.__annotations__ = {name: hint for name, hint in annotations.items() if hint is not Self}
    return _as_type_checkers(function)
