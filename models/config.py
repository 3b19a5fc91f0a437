"""Defines the config of a model as frozen data; families differ in these fields and in nothing else."""

from dataclasses import dataclass, replace
from typing import Any

from decodax.core.weight import Weight
from decodax.layers.feed_forward import FeedForward
from decodax.layers.mixers.contract import Mixer
from decodax.layers.norm import Norm


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
class SubLayer:
    """A mixer or a feed-forward layer f with its norms: keep x + add post_norm(f(norm(x))).

    layer: the mixer or the feed-forward layer.
    norm: of its input.
    post_norm: of its output; None for none.
    residual: how it is added.
    """

    layer: Any
    norm: Norm
    post_norm: Norm | None = None
    residual: Residual = Residual()

    def weights(self, name: str, hidden_size: int) -> dict[str, Any]:
        """Those of the layer under this name, and of its norms under `{name}_norm` and the like."""
        norms = {"norm": self.norm, "post_norm": self.post_norm}
        described = {f"{name}_{kind}": norm.weights(hidden_size) for kind, norm in norms.items() if norm is not None}
        return {**described, name: self.layer.weights(hidden_size)}


@dataclass(frozen=True)
class BlockConfig:
    """One layer of the model: a mixer sub-layer (attention, or a recurrence), then a feed-forward sub-layer."""

    mixer: SubLayer
    feed_forward: SubLayer

    def with_mixer(self, mixer: Mixer) -> "BlockConfig":
        """The block with another mixer."""
        return replace(self, mixer=replace(self.mixer, layer=mixer))

    def weights(self, hidden_size: int) -> dict[str, Any]:
        mixer, feed_forward = self.mixer, self.feed_forward
        return {**mixer.weights("mixer", hidden_size), **feed_forward.weights("feed_forward", hidden_size)}


def pre_norm_block(
    mixer: Mixer, feed_forward: FeedForward, norm: Norm, *, post_norm: Norm | None = None
) -> BlockConfig:
    """Norm, mixer, add; norm, feed-forward, add: the block of most families.

    norm: of both inputs.
    post_norm: of both outputs.
    """
    return BlockConfig(SubLayer(mixer, norm, post_norm), SubLayer(feed_forward, norm, post_norm))


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
    final_norm: Norm
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
