"""Defines the config of a model as frozen data; families differ in these fields and in nothing else."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from decodax.core.weight import Weight
from decodax.layers.feed_forward import FeedForward
from decodax.layers.mixers.contract import Mixer
from decodax.layers.norm import Norm
from decodax.models.embedding import EmbeddingConfig
from decodax.models.head import HeadConfig

_PLAIN_EMBEDDING, _PLAIN_HEAD = EmbeddingConfig(), HeadConfig()
Order = Literal["serial", "parallel", "parallel, one norm"]


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
    """A mixer or a feed-forward layer f with its norms: sum_norm(keep x + add post_norm(f(norm(x)))).

    layer: the mixer or the feed-forward layer.
    norm: of its input; None for none (OLMo 2).
    post_norm: of its output; None for none.
    residual: how it is added.
    sum_norm: of the sum (OPT-350M); None for none.
    """

    layer: Any
    norm: Norm | None
    post_norm: Norm | None = None
    residual: Residual = Residual()
    sum_norm: Norm | None = None

    def weights(self, name: str, hidden_size: int) -> dict[str, Any]:
        """Those of the layer under this name, and of its norms under `{name}_norm` and the like."""
        norms = {"norm": self.norm, "post_norm": self.post_norm, "sum_norm": self.sum_norm}
        described = {f"{name}_{kind}": norm.weights(hidden_size) for kind, norm in norms.items() if norm is not None}
        return {**described, name: self.layer.weights(hidden_size)}


@dataclass(frozen=True)
class BlockConfig:
    """One layer of the model: a mixer sub-layer (attention, or a recurrence) and a feed-forward sub-layer.

    mixer: the mixer sub-layer.
    feed_forward: the feed-forward sub-layer; None for a block that is a mixer alone.
    order: "serial": the feed-forward layer reads the mixer's sum; "parallel": it reads the block's input, through a
        norm of its own (GPT-NeoX); "parallel, one norm": it reads what the mixer reads (Cohere, Phi).
    output_scale: a learned number multiplies the block's output (Gemma 4).
    """

    mixer: SubLayer
    feed_forward: SubLayer | None
    order: Order = "serial"
    output_scale: bool = False

    def __post_init__(self) -> None:
        if self.order == "serial":
            return
        residuals = [sub_layer.residual for sub_layer in (self.mixer, self.feed_forward) if sub_layer is not None]
        if len(residuals) < 2 or any(residual.keep != 1 or residual.after_norm for residual in residuals):
            raise ValueError(
                f"a block of order {self.order!r} must have a feed-forward layer, and keep its input as it is"
            )
        if self.order == "parallel, one norm" and self.feed_forward is not None and self.feed_forward.norm is not None:
            raise ValueError(f"a block of order {self.order!r} must have no norm of the feed-forward layer's own")

    @property
    def feed_forward_layer(self) -> FeedForward | None:
        return None if self.feed_forward is None else self.feed_forward.layer

    def with_mixer(self, mixer: Mixer) -> "BlockConfig":
        """The block with another mixer."""
        return replace(self, mixer=replace(self.mixer, layer=mixer))

    def weights(self, hidden_size: int) -> dict[str, Any]:
        weights = self.mixer.weights("mixer", hidden_size)
        if self.feed_forward is not None:
            weights |= self.feed_forward.weights("feed_forward", hidden_size)
        if self.output_scale:
            weights["output_scale"] = Weight(("X",), (1,), "ones")
        return weights


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
    final_norm: before the head; None for none.
    tie_embeddings: whether the head is the embedding.
    embedding: makes the input of the first layer.
    head: makes the logits.
    """

    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    blocks: tuple[BlockConfig, ...]
    final_norm: Norm | None
    tie_embeddings: bool
    embedding: EmbeddingConfig = _PLAIN_EMBEDDING
    head: HeadConfig = _PLAIN_HEAD

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    def weights(self) -> dict[str, Any]:
        """Descriptions of all weights: a dictionary nested like the parameters, one subtree per layer."""
        weights = self.embedding.weights(self.vocab_size, self.hidden_size)
        for index, block in enumerate(self.blocks):
            weights[f"blocks_{index}"] = block.weights(self.hidden_size)
        if self.final_norm is not None:
            weights["final_norm"] = self.final_norm.weights(self.hidden_size)
        weights |= self.head.weights(self.vocab_size, self.hidden_size, tied=self.tie_embeddings)
        return without_empty(weights)


def without_empty(weights: dict[str, Any]) -> dict[str, Any]:
    """A nested description without the empty dictionaries of norms that have no weights."""
    nested = {name: without_empty(item) if isinstance(item, dict) else item for name, item in weights.items()}
    return {name: item for name, item in nested.items() if item != {}}
