"""What a model is, as frozen data: every family is described by these fields, and nothing else tells families apart."""

from dataclasses import dataclass
from typing import Any

from decodax.layers.feed_forward import FeedForward
from decodax.layers.mixers._contract import Mixer
from decodax.layers.norm import RMSNormConfig
from decodax.layers.weight import Weight


@dataclass(frozen=True)
class Residual:
    """How a part of a block is added: keep x + add part(norm(x)); with `behind_norm` the first x is norm(x), too."""

    keep: float = 1.0
    add: float = 1.0
    behind_norm: bool = False


@dataclass(frozen=True)
class BlockConfig:
    """One layer: norm, mixer, add; norm, feed-forward, add. `post_norms` also norms what is added (Gemma 2)."""

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
    """A decoder-only language model. `max_position_embeddings` is its context in tokens.

    `embedding_scale` multiplies the token embeddings (Gemma), `logit_scale` the logits (Granite), and `logit_softcap`
    bounds them (Gemma 2).
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
        """Descriptions of all weights: a nested dictionary with the parameters' shape, one subtree per layer."""
        embedding = Weight(("V", "D"), (self.vocab_size, self.hidden_size))
        weights: dict[str, Any] = {"embedding": embedding}
        for index, block in enumerate(self.blocks):
            weights[f"blocks_{index}"] = block.weights(self.hidden_size)
        weights["final_norm"] = self.final_norm.weights(self.hidden_size)
        if not self.tie_embeddings:
            weights["head"] = embedding
        return weights
