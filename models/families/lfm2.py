"""Describes LFM2: gated short convolutions, with attention in some layers.

LFM2 Technical Report, arXiv 2511.23404.
"""

from dataclasses import replace

from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.head_norms import HeadNorms
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.mixers.short_convolution import ShortConvolutionConfig
from decodax.layers.norm import RMSNormConfig
from decodax.models.checkpoints.name_map import TensorSlice, fused_rows
from decodax.models.config import BlockConfig
from decodax.models.families.contract import OUTER_TENSORS, BlockTensors, Family
from decodax.models.families.layer import Fields, Layer, attention, sizes


def _layer_kind(fields: Fields, index: int) -> str:
    attending = fields["full_attn_idxs"]
    return "full_attention" if attending is None or index in attending else "conv"


def _mixer(layer: Layer) -> GQAConfig | ShortConvolutionConfig:
    fields = layer.fields
    if layer.kind == "conv":
        return ShortConvolutionConfig(fields["hidden_size"], fields["conv_L_cache"], fields["conv_bias"])
    return replace(attention(layer), head_norms=HeadNorms(layer.norm, layer.norm))


def _width(fields: Fields) -> int:
    """That in the file is of an MLP without a gate, unless `block_auto_adjust_ff_dim` is false."""
    width: int = fields["intermediate_size"]
    if fields["block_auto_adjust_ff_dim"]:
        width = int(2 * width / 3)
        if fields["block_ffn_dim_multiplier"] is not None:
            multiple, width = fields["block_multiple_of"], int(fields["block_ffn_dim_multiplier"] * width)
            width = -(-width // multiple) * multiple
    return width


def _unsupported(fields: Fields) -> list[str]:
    if _width(fields):
        return []
    factor = fields["block_ffn_dim_multiplier"]
    return [
        f"intermediate_size x 2/3 x block_ffn_dim_multiplier must be at least 1, got {fields['intermediate_size']} and "
        f"{1.0 if factor is None else factor}"
    ]


def _tensors(block: BlockConfig) -> BlockTensors:
    mixer = block.mixer.layer
    common: BlockTensors = {
        "mixer_norm/weight": "operator_norm.weight",
        "feed_forward_norm/weight": "ffn_norm.weight",
        "feed_forward/gate": "feed_forward.w1.weight",
        "feed_forward/up": "feed_forward.w3.weight",
        "feed_forward/down": "feed_forward.w2.weight",
    }
    if isinstance(mixer, GQAConfig):
        return {
            **common,
            **{f"mixer/{name}": f"self_attn.{name[0]}_proj.weight" for name in ("query", "key", "value")},
            "mixer/out": "self_attn.out_proj.weight",
            "mixer/query_norm/weight": "self_attn.q_layernorm.weight",
            "mixer/key_norm/weight": "self_attn.k_layernorm.weight",
        }
    assert isinstance(mixer, ShortConvolutionConfig)
    parts: dict[str, int] = dict.fromkeys(("mixer/input_gate", "mixer/output_gate", "mixer/value"), mixer.num_channels)
    convolution = TensorSlice("conv.conv.weight", shape=(mixer.num_channels, 1, mixer.width))
    return {
        **common,
        **fused_rows("conv.in_proj.weight", parts),
        **fused_rows("conv.in_proj.bias", {f"{name}_bias": size for name, size in parts.items()}),
        "mixer/convolution": ((convolution,),),
        "mixer/convolution_bias": "conv.conv.bias",
        "mixer/out": "conv.out_proj.weight",
        "mixer/out_bias": "conv.out_proj.bias",
    }


FAMILY = Family(
    model_type="lfm2",
    defaults={
        **sizes(65536, 2560, 12288, 32, 32),
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 128000,
        "norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "full_attn_idxs": None,
        "layer_types": None,
    },
    aliases={"tie_embedding": "tie_word_embeddings", "block_ff_dim": "intermediate_size"},
    nullable=frozenset({"block_ffn_dim_multiplier", "full_attn_idxs", "layer_types"}),
    # Other names of sizes, and flags that the class does not read.
    ignored=frozenset(
        {"block_dim", "block_mlp_init_scale", "block_norm_eps", "block_out_init_scale", "block_use_swiglu"}
        | {"block_use_xavier_init", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads", "theta"}
    ),
    layer_kind=_layer_kind,
    kinds=frozenset({"full_attention", "conv"}),
    mixer=_mixer,
    feed_forward=lambda layer: GatedMLPConfig(_width(layer.fields)),
    unsupported=_unsupported,
    norm=lambda fields: RMSNormConfig(float(fields["norm_eps"])),
    outer_tensors={**OUTER_TENSORS, "final_norm/weight": "model.embedding_norm.weight"},
    block_tensors=_tensors,
)
