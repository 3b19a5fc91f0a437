"""The checker that the test session puts on every function of decodax: beartype, which also knows `Self` here.

jaxtyping's import hook decorates methods one by one, before their class exists, and beartype refuses `Self` in such a
place. So `Self` alone is left unchecked; everything else in the same signature is checked.
"""

from collections.abc import Callable
from typing import Any, Self

from beartype import beartype


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, raising where an argument or the result is not what its annotation says."""
    annotations = getattr(function, "__annotations__", {})
    if Self in annotations.values():
        function.__annotations__ = {name: hint for name, hint in annotations.items() if hint is not Self}
    return beartype(function)
