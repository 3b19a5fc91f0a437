"""Normalises queries, keys and values, each head alone or all heads at once.

Query-Key Normalization for Transformers, arXiv 2010.04245, with learned norms as in Qwen 3 (each head), OLMo 2 (all
heads at once), Gemma 4 (values, too) and Cohere (each head with weights of its own).
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Array, Float

from decodax.core.weight import Weight
from decodax.layers.norm import Norm, Size

Projection = Literal["query", "key", "value"]
_FLAT_AXES: dict[Projection, str] = {"query": "NH", "key": "KH", "value": "KH"}
_HEAD_AXES: dict[Projection, str] = {"query": "N H", "key": "K H", "value": "K H"}


@dataclass(frozen=True)
class HeadNorms:
    """The norms of what a layer attends with.

    query, key, value: the norm of each; None for none.
    across_heads: one norm over the coordinates of all heads, not one over each head's with shared weights.
    own_weights: every head has weights of its own.
    after_rotation: queries and keys are normed after their rotation, not before.
    """

    query: Norm | None
    key: Norm | None
    value: Norm | None = None
    across_heads: bool = False
    own_weights: bool = False
    after_rotation: bool = False

    def __post_init__(self) -> None:
        if self.across_heads and (self.after_rotation or self.own_weights):
            raise ValueError("across_heads must be false with after_rotation and own_weights: they are of single heads")

    def norm(self, projection: Projection) -> Norm | None:
        return {"query": self.query, "key": self.key, "value": self.value}[projection]

    def weights(self, num_heads: int, num_kv_heads: int, head_size: int) -> dict[str, dict[str, Weight]]:
        """Descriptions of the weights, of the norms that have some."""
        counts: dict[Projection, int] = {"query": num_heads, "key": num_kv_heads, "value": num_kv_heads}
        described = {}
        for projection, count in counts.items():
            if (norm := self.norm(projection)) is None:
                continue
            described[f"{projection}_norm"] = norm.weights(*self._size(projection, count, head_size), head_size)
        return {name: weights for name, weights in described.items() if weights}

    def normed(self, projection: Projection, heads: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """The normed heads of a projection. For use in a linen module, whose parameters these are."""
        if (norm := self.norm(projection)) is None:
            return heads
        inputs = heads.reshape(*heads.shape[:2], -1) if self.across_heads else heads
        normed = norm.module(*self._size(projection, *heads.shape[2:]), name=f"{projection}_norm")(inputs)
        return normed.reshape(heads.shape)

    def _size(self, projection: Projection, count: int, head_size: int) -> tuple[Size, str]:
        """The size of the weights of a norm, and their axes."""
        if self.across_heads:
            return count * head_size, _FLAT_AXES[projection]
        return ((count, head_size), _HEAD_AXES[projection]) if self.own_weights else (head_size, "H")
