"""Implements RMSNorm, and the protocol of a norm of the residual stream, of heads or of latents.

Root Mean Square Layer Normalization, arXiv 1910.07467. `unit_offset` is Gemma's convention: the stored weight is the
deviation from one.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decodax.core.weight import Weight, fetch_own


@runtime_checkable
class Norm(Protocol):
    """The contract between a layer and the config of a norm over its last axis."""

    def weights(self, size: int, axis: str = "D", block_size: int = 1) -> dict[str, Weight]:
        """Descriptions of the weights.

        size: coordinates.
        axis: their logical axes.
        block_size: coordinates of one head, in a norm of several heads.
        """
        ...

    def module(self, size: int, axis: str = "D", *, name: str | None = None) -> nn.Module:
        """A linen module from Float[..., size] to the same shape and dtype."""
        ...


@dataclass(frozen=True)
class RMSNormConfig:
    """The config of an RMSNorm: x / sqrt(mean(x^2) + eps) * scale.

    eps: added to the mean square.
    unit_offset: the scale is 1 + weight.
    """

    eps: float
    unit_offset: bool = False

    def weights(self, size: int, axis: str = "D", block_size: int = 1) -> dict[str, Weight]:
        return {"weight": Weight((axis,), (size,), "zeros" if self.unit_offset else "ones", block_size=block_size)}

    def module(self, size: int, axis: str = "D", *, name: str | None = None) -> nn.Module:
        return RMSNorm(self, size, axis, name=name)


class RMSNorm(nn.Module):
    """Computed in float32, returned in the input's dtype.

    Rounded once, after the scale, in all families, as Gemma's norm is in transformers. Those of Llama and most others
    round there before the scale, too, so that a bfloat16 result may differ in its last bit.
    """

    config: RMSNormConfig
    size: int
    axis: str = "D"

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        weight = fetch_own(self, self.config.weights(self.size, self.axis))["weight"].astype(jnp.float32)
        wide = inputs.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.config.eps)
        weight = 1.0 + weight if self.config.unit_offset else weight
        weight = jnp.expand_dims(weight, range(inputs.ndim - 1))
        return (wide * (scale * weight)).astype(inputs.dtype)
