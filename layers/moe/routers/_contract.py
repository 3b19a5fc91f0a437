"""What the layer asks of a router: frozen data that names its weights and turns tokens into routes."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from decodax.layers.moe.routes import Routes
from decodax.layers.weight import Weight


@runtime_checkable
class Router(Protocol):
    """Chooses experts. Whatever the tokens' dtype, scores and gates are float32."""

    @property
    def num_experts(self) -> int: ...

    @property
    def experts_per_token(self) -> float:
        """How many choices a token has, on average where experts choose."""
        ...

    def weights(self, hidden_size: int) -> dict[str, Weight]:
        """`weight` [E, D], and what else the router has."""
        ...

    def route(self, tokens: Float[Array, "B T D"], weights: dict[str, Any]) -> Routes:
        """The choices [B, T, X] of all tokens; one row of the batch has no influence on another."""
        ...
