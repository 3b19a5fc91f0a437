"""Implements feed-forward layers: gated, down(activation(gate(x)) * up(x)), and plain, down(activation(up(x))).

GLU Variants Improve Transformer, arXiv 2002.05202.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decodax.core.linear import linear
from decodax.core.weight import Weight, fetch_own
from decodax.layers.execution import Execution
from decodax.layers.row_parallel import row_parallel_linear

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda inputs: jnp.square(jax.nn.relu(inputs)),
}


@dataclass(frozen=True)
class ClampedSwiGLU:
    """(up + 1) * gate * sigmoid(alpha * gate), with gate at most `limit` and up in -limit..limit.

    The activation of gpt-oss (gpt-oss-120b & gpt-oss-20b Model Card, arXiv 2508.10925).

    alpha: slope of the sigmoid.
    limit: of gate and up.
    """

    alpha: float
    limit: float

    def __call__(self, gate: Array, up: Array) -> Array:
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)


Activation = str | ClampedSwiGLU


def gated(activation: Activation, gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"]) -> Array:
    """The input of a gated layer's last product: activation(gate) * up for a name of ACTIVATIONS."""
    return ACTIVATIONS[activation](gate) * up if isinstance(activation, str) else activation(gate, up)


def check_activation(activation: Activation) -> None:
    """Raises ValueError for a name that is not in ACTIVATIONS."""
    if isinstance(activation, str) and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)} or a ClampedSwiGLU, got {activation!r}")


@runtime_checkable
class FeedForward(Protocol):
    """The contract between a block and its feed-forward layer's config."""

    def weights(self, hidden_size: int) -> dict[str, Any]:
        """`Weight` descriptions of the weights, as a (nested) dictionary of the parameters' shape."""
        ...

    def module(self, hidden_size: int, name: str, execution: Execution) -> nn.Module:
        """A linen module that maps Float[B, T, D] to Float[B, T, D], and the routes of the tokens.

        The routes are None for a layer without experts.
        """
        ...


@dataclass(frozen=True)
class GatedMLPConfig:
    """The config of a gated MLP.

    intermediate_size: F.
    activation: a name of ACTIVATIONS, or a ClampedSwiGLU.
    bias: adds one to each of the three products.
    """

    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False

    def __post_init__(self) -> None:
        check_activation(self.activation)

    def weights(self, hidden_size: int) -> dict[str, Weight]:
        wide, narrow = self.intermediate_size, hidden_size
        weights = {
            "gate": Weight(("F", "D"), (wide, narrow)),
            "up": Weight(("F", "D"), (wide, narrow)),
            "down": Weight(("D", "F"), (narrow, wide)),
        }
        if self.bias:
            weights |= {
                "gate_bias": Weight(("F",), (wide,), "zeros"),
                "up_bias": Weight(("F",), (wide,), "zeros"),
                "down_bias": Weight(("D",), (narrow,), "zeros"),
            }
        return weights

    def module(self, hidden_size: int, name: str, execution: Execution) -> nn.Module:
        return GatedMLP(self, hidden_size, execution, name=name)


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    config: GatedMLPConfig
    hidden_size: int
    execution: Execution

    @nn.compact
    def __call__(self, inputs: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], None]:
        weight = fetch_own(self, self.config.weights(self.hidden_size), self.execution.padded)
        gate = linear(inputs, weight["gate"], weight.get("gate_bias"))
        up = linear(inputs, weight["up"], weight.get("up_bias"))
        product = gated(self.config.activation, gate, up)
        down, bias = weight["down"], weight.get("down_bias")
        return row_parallel_linear(product, down, bias, axis_name="F", execution=self.execution), None


@dataclass(frozen=True)
class MLPConfig:
    """The config of a plain MLP.

    intermediate_size: F.
    activation: a name of ACTIVATIONS.
    bias: adds one to each of the two products.
    """

    intermediate_size: int
    activation: str
    bias: bool = False

    def __post_init__(self) -> None:
        check_activation(self.activation)

    def weights(self, hidden_size: int) -> dict[str, Weight]:
        wide, narrow = self.intermediate_size, hidden_size
        weights = {"up": Weight(("F", "D"), (wide, narrow)), "down": Weight(("D", "F"), (narrow, wide))}
        if self.bias:
            weights["up_bias"] = Weight(("F",), (wide,), "zeros")
            weights["down_bias"] = Weight(("D",), (narrow,), "zeros")
        return weights

    def module(self, hidden_size: int, name: str, execution: Execution) -> nn.Module:
        return MLP(self, hidden_size, execution, name=name)


class MLP(nn.Module):
    """down(activation(up(x)))."""

    config: MLPConfig
    hidden_size: int
    execution: Execution

    @nn.compact
    def __call__(self, inputs: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], None]:
        weight = fetch_own(self, self.config.weights(self.hidden_size), self.execution.padded)
        inner = ACTIVATIONS[self.config.activation](linear(inputs, weight["up"], weight.get("up_bias")))
        down, bias = weight["down"], weight.get("down_bias")
        return row_parallel_linear(inner, down, bias, axis_name="F", execution=self.execution), None
