"""Defines the config of a model as frozen data; families differ in these fields and in nothing else."""

from dataclasses import dataclass
from typing import Any

from decodax.core.weight import Weight
from decodax.layers.feed_forward import FeedForward
from decodax.layers.mixers.contract import Mixer
from decodax.layers.norm import RMSNormConfig


@dataclass(frozen=True)
class Residual:
    """How a block adds its mixer or feed-forward f: keep x + add f(norm(x)).

    keep, add: factors of the two terms.
    after_norm: whether the kept term is norm(x), too.
    """

    keep: float = 1.0
    add: float = 1.0
    after_norm: bool = False


@dataclass(frozen=True)
class BlockConfig:
    """One layer: norm, mixer, add; norm, feed-forward, add.

    mixer, feed_forward: the two sublayers.
    norm: of their inputs.
    post_norms: also norm what is added (Gemma 2).
    mixer_residual, feed_forward_residual: how each is added.
    """

    mixer: Mixer
    feed_forward: FeedForward
    norm: RMSNormConfig
    post_norms: bool = False
    mixer_residual: Residual = Residual()
    feed_forward_residual: Residual = Residual()

    def weights(self, hidden_size: int) -> dict[str, Any]:
        weights: dict[str, Any] = {
            "mixer_norm": self.norm.weights(hidden_size),
            "mixer": self.mixer.weights(hidden_size),
            "feed_forward_norm": self.norm.weights(hidden_size),
            "feed_forward": self.feed_forward.weights(hidden_size),
        }
        if self.post_norms:
            weights["mixer_post_norm"] = self.norm.weights(hidden_size)
            weights["feed_forward_post_norm"] = self.norm.weights(hidden_size)
        return weights


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model.

    vocab_size: tokens of the vocabulary.
    hidden_size: of the residual stream.
    max_position_embeddings: context in tokens.
    blocks: the layers.
    final_norm: before the head.
    tie_embeddings: whether the head is the embedding.
    embedding_scale: multiplies the token embeddings (Gemma).
    logit_softcap: bounds the logits (Gemma 2).
    logit_scale: multiplies the logits (Granite).
    """

    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    blocks: tuple[BlockConfig, ...]
    final_norm: RMSNormConfig
    tie_embeddings: bool
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    def weights(self) -> dict[str, Any]:
        """Descriptions of all weights: a dictionary nested like the parameters, one subtree per layer."""
        embedding = Weight(("V", "D"), (self.vocab_size, self.hidden_size))
        weights: dict[str, Any] = {"embedding": embedding}
        for index, block in enumerate(self.blocks):
            weights[f"blocks_{index}"] = block.weights(self.hidden_size)
        weights["final_norm"] = self.final_norm.weights(self.hidden_size)
        if not self.tie_embeddings:
            weights["head"] = embedding
        return weights
