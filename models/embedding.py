"""Defines what comes before the layers: token embeddings, and learned positions, a projection and a norm in some."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.core.linear import linear
from decodax.core.weight import Weight
from decodax.layers.norm import Norm


@dataclass(frozen=True)
class LearnedPositions:
    """One learned vector per position, added to the token's embedding (GPT-2, OPT).

    count: vectors.
    offset: number of the vector of position 0; OPT keeps two for padding before it.
    """

    count: int
    offset: int = 0


@dataclass(frozen=True)
class EmbeddingConfig:
    """norm(project(scale x embedding[token]) + position embedding): the input of the first layer.

    scale: multiplies the token embeddings (Gemma).
    size: of the token embeddings, where a projection makes the model's width of them (OPT-350M).
    positions: learned ones; None where the layers know positions (rotation, ALiBi).
    norm: of the sum (BLOOM).
    """

    scale: float = 1.0
    size: int | None = None
    positions: LearnedPositions | None = None
    norm: Norm | None = None

    def weights(self, vocab_size: int, hidden_size: int) -> dict[str, Any]:
        """Descriptions of the weights, by their names in the model's parameters."""
        weights: dict[str, Any] = {"embedding": Weight(("V", "D"), (vocab_size, self.size or hidden_size))}
        if self.size is not None:
            weights["embedding_projection"] = Weight(("D", "D"), (hidden_size, self.size))
        if self.positions is not None:
            weights["position_embedding"] = Weight(("S", "D"), (self.positions.count, hidden_size), replicated=True)
        if self.norm is not None:
            weights["embedding_norm"] = self.norm.weights(hidden_size)
        return weights

    def embedded(
        self, weight: Mapping[str, Array], tokens: Int[Array, "B T"], position: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """The sum of a token's embedding and its position's, before the norm; `weight` holds the arrays."""
        hidden = weight["embedding"][tokens]
        hidden = hidden * jnp.asarray(self.scale, hidden.dtype)
        if self.size is not None:
            hidden = linear(hidden, weight["embedding_projection"])
        if self.positions is not None:
            hidden = hidden + weight["position_embedding"][position + self.positions.offset]
        return hidden
