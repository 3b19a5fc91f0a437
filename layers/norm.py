"""Implements the norms of a residual stream, of heads and of latents, behind one protocol: RMSNorm and LayerNorm.

Root Mean Square Layer Normalization, arXiv 1910.07467; Layer Normalization, arXiv 1607.06450. `unit_offset` is the
convention of Gemma and Nemotron: the stored weight is the deviation from one.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from decodax.core.weight import Weight, fetch_own

Size = int | tuple[int, ...]  # of a norm's weights


@runtime_checkable
class Norm(Protocol):
    """The contract between a layer and the config of a norm over its last axis."""

    def weights(self, size: Size, axis: str = "D", block_size: int = 1) -> dict[str, Weight]:
        """Descriptions of the weights, which may be none.

        size: coordinates; or heads and the coordinates of each, where every head has weights of its own.
        axis: the logical axes, separated by spaces.
        block_size: coordinates of one head, in one norm over several heads.
        """
        ...

    def module(self, size: Size, axis: str = "D", *, name: str | None = None) -> nn.Module:
        """A linen module from Float[..., size] to the same shape and dtype; what it norms is the last axis."""
        ...


@dataclass(frozen=True)
class RMSNormConfig:
    """The config of an RMSNorm: x / sqrt(mean(x^2) + eps) * scale.

    eps: added to the mean square.
    unit_offset: the scale is 1 + weight.
    has_weight: whether there is a scale.
    """

    eps: float
    unit_offset: bool = False
    has_weight: bool = True

    def weights(self, size: Size, axis: str = "D", block_size: int = 1) -> dict[str, Weight]:
        return _weights(self.has_weight, False, self.unit_offset, size, axis, block_size)

    def module(self, size: Size, axis: str = "D", *, name: str | None = None) -> nn.Module:
        return RMSNorm(self, size, axis, name=name)


@dataclass(frozen=True)
class LayerNormConfig:
    """The config of a LayerNorm: (x - mean(x)) / sqrt(variance(x) + eps) * scale + bias.

    eps: added to the variance.
    unit_offset: the scale is 1 + weight.
    has_weight, has_bias: whether there is a scale, and a bias.
    """

    eps: float
    unit_offset: bool = False
    has_weight: bool = True
    has_bias: bool = True

    def weights(self, size: Size, axis: str = "D", block_size: int = 1) -> dict[str, Weight]:
        return _weights(self.has_weight, self.has_bias, self.unit_offset, size, axis, block_size)

    def module(self, size: Size, axis: str = "D", *, name: str | None = None) -> nn.Module:
        return LayerNorm(self, size, axis, name=name)


def _weights(
    has_weight: bool, has_bias: bool, unit_offset: bool, size: Size, axis: str, block_size: int
) -> dict[str, Weight]:
    axes, shape = tuple(axis.split()), (size,) if isinstance(size, int) else size
    weights: dict[str, Weight] = {}
    if has_weight:
        weights["weight"] = Weight(axes, shape, "zeros" if unit_offset else "ones", block_size=block_size)
    if has_bias:
        weights["bias"] = Weight(axes, shape, "zeros", block_size=block_size)
    return weights


class RMSNorm(nn.Module):
    """Computed in float32, returned in the input's dtype.

    Rounded once, after the scale, in all families, as Gemma's norm is in transformers. Those of Llama and most others
    round there before the scale, too, so that a bfloat16 result may differ in its last bit.
    """

    config: RMSNormConfig
    size: Size
    axis: str = "D"

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
        weight = fetch_own(self, self.config.weights(self.size, self.axis))
        wide = inputs.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.config.eps)
        if self.config.has_weight:
            scale = scale * _factor(weight["weight"], self.config.unit_offset, inputs.ndim)
        return (wide * scale).astype(inputs.dtype)


class LayerNorm(nn.Module):
    """Computed in float32, returned in the input's dtype, rounded once."""

    config: LayerNormConfig
    size: Size
    axis: str = "D"

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
        weight = fetch_own(self, self.config.weights(self.size, self.axis))
        wide = inputs.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.config.eps)
        if self.config.has_weight:
            scale = scale * _factor(weight["weight"], self.config.unit_offset, inputs.ndim)
        result = centred * scale
        if self.config.has_bias:
            result = result + _expanded(weight["bias"], inputs.ndim)
        return result.astype(inputs.dtype)


def _factor(weight: Float[Array, "*size"], unit_offset: bool, ndim: int) -> Float32[Array, "..."]:
    wide = _expanded(weight, ndim)
    return 1.0 + wide if unit_offset else wide


def _expanded(weight: Float[Array, "*size"], ndim: int) -> Float32[Array, "..."]:
    return jnp.expand_dims(weight.astype(jnp.float32), range(ndim - weight.ndim))
