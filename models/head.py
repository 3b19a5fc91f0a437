"""Defines what comes after the layers: the head that makes logits of normed hidden states."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from decodax.core.linear import linear
from decodax.core.weight import Weight


@dataclass(frozen=True)
class HeadConfig:
    """cap(scale x (head x project(hidden) + bias)): the logits of normed hidden states.

    scale: multiplies the logits (Granite).
    softcap: bounds them, softcap tanh(logits / softcap) (Gemma 2).
    bias: one number per token (Phi).
    size: of the head's input, where a projection makes it of the model's width (OPT-350M).
    """

    scale: float = 1.0
    softcap: float | None = None
    bias: bool = False
    size: int | None = None

    def weights(self, vocab_size: int, hidden_size: int, *, tied: bool) -> dict[str, Any]:
        """Descriptions of the weights, by their names in the model's parameters; a tied head is the embedding."""
        weights: dict[str, Any] = {}
        if not tied:
            weights["head"] = Weight(("V", "D"), (vocab_size, self.size or hidden_size))
        if self.size is not None:
            weights["head_projection"] = Weight(("D", "D"), (self.size, hidden_size))
        if self.bias:
            weights["head_bias"] = Weight(("V",), (vocab_size,), "zeros")
        return weights

    def logits(
        self, weight: Mapping[str, Array], normed: Float[Array, "*batch D"], vocab_size: int
    ) -> Float32[Array, "*batch V"]:
        """The logits of all tokens; `weight` holds the arrays, those of the embedding too."""
        # The padding of the vocabulary on a mesh is cut off; each device keeps its shard, so nothing is moved.
        inputs, bias = self._projected(weight, normed), weight.get("head_bias")
        logits = linear(inputs, _head(weight), bias, output_dtype=jnp.float32)
        return self._scaled(logits[..., :vocab_size])

    def token_logits(
        self, weight: Mapping[str, Array], normed: Float[Array, "*batch D"], tokens: Int[Array, "*batch I"]
    ) -> Float32[Array, "*batch I"]:
        """The logits of some tokens each."""
        inputs, wide = self._projected(weight, normed), {"preferred_element_type": jnp.float32}
        logits = jnp.einsum("...d,...id->...i", inputs, _head(weight)[tokens], **wide)
        if self.bias:
            logits = logits + weight["head_bias"].astype(jnp.float32)[tokens]
        return self._scaled(logits)

    def _projected(self, weight: Mapping[str, Array], normed: Array) -> Array:
        return normed if self.size is None else linear(normed, weight["head_projection"])

    def _scaled(self, logits: Array) -> Array:
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


def _head(weight: Mapping[str, Array]) -> Float[Array, "V D"]:
    return weight["head"] if "head" in weight else weight["embedding"]
