"""Takes logits processors of one's own: a function of a few lines, or an object with arrays."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jaxtyping import Array, Float32

from decodax.core import pytree
from decodax.core.arguments import is_hashable, refusal
from decodax.decoding.logits_processors.contract import History, LogitsProcessor

_EXPECTED = "functions (logits, history) -> logits, or LogitsProcessor objects that are pytrees"


@pytree.dataclass
class OwnProcessor(LogitsProcessor):
    """A function without arrays: compiled code is kept for it, so the same one must be passed at every call."""

    function: Callable[..., Any] = pytree.static()
    needs_tokens = True

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def __call__(self, logits: Float32[Array, "B V"], history: History) -> Any:
        return self.function(logits, history)


def own_processors(given: Any) -> tuple[LogitsProcessor, ...]:
    """Processors of one's own, one or several, as ours."""
    several = isinstance(given, Iterable) and not callable(given)
    return tuple(map(_own_processor, given if several else (given,)))


def _own_processor(given: Any) -> LogitsProcessor:
    """One of them.

    given: a function, or any hashable object that can be called: it gets a `History` with tokens and without counts. Or
        a `LogitsProcessor` that is a pytree (`decodax.core.pytree.dataclass`): its arrays may change from call to call,
        and it says what it needs.
    Raises ValueError for what cannot be called, or not be hashed.
    """
    if isinstance(given, LogitsProcessor) and jax.tree.structure(given) != jax.tree.structure(0):
        return given
    if not callable(given) or isinstance(given, type | LogitsProcessor):
        raise refusal("logits_processors", _EXPECTED, given)
    if not is_hashable(given):
        raise refusal("logits_processors", "hashable, as compiled code is kept for each", given)
    return OwnProcessor(given)
