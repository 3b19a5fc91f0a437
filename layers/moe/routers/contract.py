"""Defines the contract between a mixture of experts and its router, which maps tokens to routes."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from decodax.core.weight import Weight
from decodax.layers.moe.routes import Routes


@runtime_checkable
class Router(Protocol):
    """Chooses experts. Scores and gates are float32 for tokens of any dtype."""

    @property
    def num_experts(self) -> int: ...

    @property
    def experts_per_token(self) -> float:
        """How many experts a token has; the mean where experts choose."""
        ...

    def weights(self, hidden_size: int) -> dict[str, Weight]:
        """`weight` [E, D], and any others of the router."""
        ...

    def route(self, tokens: Float[Array, "B T D"], weights: dict[str, Any]) -> Routes:
        """The choices [B, T, X] of all tokens; rows do not affect each other."""
        ...
