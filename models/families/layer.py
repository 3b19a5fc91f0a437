"""Defines `Layer`, the input of a family's builders, and the builders that most families share."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from decodax.layers.feed_forward import GatedMLPConfig, MLPConfig
from decodax.layers.head_norms import HeadNorms
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.norm import LayerNormConfig, Norm, RMSNormConfig
from decodax.layers.rope import Rope
from decodax.models.config import BlockConfig, Residual, SubLayer, pre_norm_block
from decodax.models.embedding import EmbeddingConfig
from decodax.models.head import HeadConfig

if TYPE_CHECKING:
    from decodax.models.families.contract import Family

Fields = Mapping[str, Any]  # the fields of a config.json that a family reads, defaults filled in

ACTIVATION_NAMES = {  # of transformers: ours, in `layers.feed_forward.ACTIVATIONS`
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class Layer:
    """One layer of a model whose config is being read.

    family: of the model.
    index: of the layer.
    kind: its name in `layer_types` or by the family's rule.
    fields: of the config.
    rope: its rotation; None in families without.
    rope_settings: the file's own rope dictionary, for what else depends on it.
    norm: of the model.
    """

    family: "Family"
    index: int
    kind: str
    fields: Fields
    rope: Rope | None
    rope_settings: Mapping[str, Any]
    norm: Norm

    def flag(self, source: bool | str) -> bool:
        """A constant of the family, or the value of the field that it names, where null is no."""
        return bool(self.fields[source]) if isinstance(source, str) else source

    @property
    def activation(self) -> str:
        return ACTIVATION_NAMES[self.fields[self.family.activation_field]]


def sizes(vocab: int, hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    """The default sizes of a family's class in transformers, for `Family.defaults`."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def attention(layer: Layer) -> GQAConfig:
    """Softmax attention with grouped query heads (GQA)."""
    family, fields = layer.family, layer.fields
    head_size = fields[family.head_sizes.get(layer.kind, "head_dim")]
    scaled_by = fields[family.score_scale_field] if family.score_scale_field else head_size
    softcap = fields.get("attn_logit_softcapping")
    return GQAConfig(
        num_heads=fields["num_attention_heads"],
        num_kv_heads=fields["num_key_value_heads"],
        head_size=head_size,
        positions=layer.rope,
        scale=float(scaled_by) ** -0.5,
        qkv_bias=layer.flag(family.qkv_bias),
        out_bias=layer.flag(family.out_bias),
        head_norms=HeadNorms(layer.norm, layer.norm) if layer.flag(family.head_norms) else None,
        window=fields["sliding_window"] if layer.kind == "sliding_attention" else None,
        softcap=None if softcap is None else float(softcap),
    )


def gated_mlp(layer: Layer) -> GatedMLPConfig:
    """The feed-forward layer of a model without experts."""
    return GatedMLPConfig(layer.fields["intermediate_size"], layer.activation, layer.flag(layer.family.mlp_bias))


def plain_mlp(layer: Layer) -> MLPConfig:
    """A feed-forward layer without a gate."""
    return MLPConfig(layer.fields["intermediate_size"], layer.activation, layer.flag(layer.family.mlp_bias))


def plain_embedding(fields: Fields) -> EmbeddingConfig:
    """Token embeddings as they are."""
    return EmbeddingConfig()


def scaled_embedding(fields: Fields) -> EmbeddingConfig:
    """Token embeddings times the square root of their size."""
    return EmbeddingConfig(math.sqrt(fields["hidden_size"]))


def plain_head(fields: Fields) -> HeadConfig:
    """A product with the head's matrix, and a soft-cap if the family has one."""
    softcap = fields.get("final_logit_softcapping")
    return HeadConfig(softcap=None if softcap is None else float(softcap))


def rms_norm(fields: Fields) -> RMSNormConfig:
    """An RMSNorm with a scale."""
    return RMSNormConfig(float(fields["rms_norm_eps"]))


def rms_norm_unit_offset(fields: Fields) -> RMSNormConfig:
    """An RMSNorm whose scale is 1 + weight."""
    return RMSNormConfig(float(fields["rms_norm_eps"]), unit_offset=True)


def layer_norm(eps: str, *, unit_offset: bool = False, bias: bool = True) -> Callable[[Fields], LayerNormConfig]:
    """A LayerNorm with a scale.

    eps: the field with its epsilon.
    unit_offset: the scale is 1 + weight.
    bias: whether it has one.
    """
    return lambda fields: LayerNormConfig(float(fields[eps]), unit_offset, has_bias=bias)


def pre_norm(layer: Layer) -> BlockConfig:
    """A norm before the mixer and one before the feed-forward layer."""
    return pre_norm_block(layer.family.mixer(layer), layer.family.feed_forward(layer), layer.norm)


def pre_and_post_norm(layer: Layer) -> BlockConfig:
    """A norm before and one after each of them."""
    family = layer.family
    return pre_norm_block(family.mixer(layer), family.feed_forward(layer), layer.norm, post_norm=layer.norm)


def post_norm(layer: Layer) -> BlockConfig:
    """A norm after each of them, and none before."""
    mixer, feed_forward = layer.family.mixer(layer), layer.family.feed_forward(layer)
    return BlockConfig(SubLayer(mixer, None, layer.norm), SubLayer(feed_forward, None, layer.norm))


def parallel(layer: Layer) -> BlockConfig:
    """Mixer and feed-forward layer read the same input, each through a norm of its own."""
    return replace(pre_norm(layer), order="parallel")


def parallel_one_norm(layer: Layer) -> BlockConfig:
    """Mixer and feed-forward layer read the same normed input."""
    mixer, feed_forward = layer.family.mixer(layer), layer.family.feed_forward(layer)
    return BlockConfig(SubLayer(mixer, layer.norm), SubLayer(feed_forward, None), "parallel, one norm")


def with_residuals(block: BlockConfig, mixer: Residual, feed_forward: Residual) -> BlockConfig:
    """The block with other sums."""
    assert block.feed_forward is not None
    return replace(
        block,
        mixer=replace(block.mixer, residual=mixer),
        feed_forward=replace(block.feed_forward, residual=feed_forward),
    )


def slides_if_windowed(fields: Fields, index: int) -> str:
    """All layers have sliding-window attention, if there is a window."""
    return "full_attention" if fields["sliding_window"] is None else "sliding_attention"


def kind_by_pattern(fields: Fields, index: int) -> str:
    """`sliding_window_pattern` is a number n, after n - 1 layers with a window one without, or a text like "LLLG"."""
    pattern = fields["sliding_window_pattern"]
    if not pattern:
        return "full_attention"
    has_window = pattern[index % len(pattern)] == "L" if isinstance(pattern, str) else (index + 1) % pattern != 0
    return "sliding_attention" if has_window else "full_attention"


def slides_by_pattern(fields: Fields, index: int) -> str:
    """As `kind_by_pattern`, if there is a window."""
    return "full_attention" if fields["sliding_window"] is None else kind_by_pattern(fields, index)


def slides_from_max_window_layers(fields: Fields, index: int) -> str:
    """Layers from `max_window_layers` on have sliding-window attention, if there is a window."""
    return slides_if_windowed(fields, index) if index >= fields["max_window_layers"] else "full_attention"
