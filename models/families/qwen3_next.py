"""Describes Qwen3-Next: the gated delta rule in three layers of four, gated attention in the fourth, experts in all.

Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv 2412.06464; Gated Attention for Large Language Models,
arXiv 2505.06708.
"""

from dataclasses import replace

from decodax.layers.mixers.gated_delta import GatedDeltaConfig
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.norm import RMSNormConfig
from decodax.models.checkpoints.name_map import fused_rows
from decodax.models.config import BlockConfig
from decodax.models.families._experts import is_sparse, qwen_gated_shared_experts, where
from decodax.models.families.contract import BlockTensors, Family
from decodax.models.families.layer import Fields, Layer, attention, rms_norm_unit_offset, sizes
from decodax.models.families.qwen2_moe import shared_expert_tensors


def layer_kind(fields: Fields, index: int) -> str:
    """Without `layer_types`, every `full_attention_interval`-th layer has softmax attention."""
    return "linear_attention" if (index + 1) % fields["full_attention_interval"] else "full_attention"


def delta_or_gated_attention(layer: Layer) -> GQAConfig | GatedDeltaConfig:
    """The gated delta rule, or attention with a gate on its output."""
    fields = layer.fields
    if layer.kind != "linear_attention":
        return replace(attention(layer), output_gate=True)
    return GatedDeltaConfig(
        num_key_heads=fields["linear_num_key_heads"],
        num_value_heads=fields["linear_num_value_heads"],
        key_size=fields["linear_key_head_dim"],
        value_size=fields["linear_value_head_dim"],
        convolution_width=fields["linear_conv_kernel_dim"],
        activation=layer.activation,
        scale=fields["linear_key_head_dim"] ** -0.5,
        norm=RMSNormConfig(float(fields["rms_norm_eps"])),
    )


def delta_tensors(mixer: GatedDeltaConfig) -> BlockTensors:
    """The name maps of a delta layer but for its projections; files hold its three convolutions as one."""
    keys, values = mixer.num_key_heads * mixer.key_size, mixer.num_value_heads * mixer.value_size
    stored = (mixer.num_columns, 1, mixer.convolution_width)
    parts = fused_rows("linear_attn.conv1d.weight", {"query": keys, "key": keys, "value": values}, shape=stored)
    return {
        **{f"mixer/{name}_convolution": name_maps for name, name_maps in parts.items()},
        "mixer/decay_rate": "linear_attn.A_log",
        "mixer/decay_bias": "linear_attn.dt_bias",
        "mixer/norm/weight": "linear_attn.norm.weight",
        "mixer/out": "linear_attn.out_proj.weight",
    }


def _tensors(block: BlockConfig) -> BlockTensors:
    tensors = shared_expert_tensors(block)
    mixer = block.mixer.layer
    if not isinstance(mixer, GatedDeltaConfig):
        return tensors
    size, group = mixer.key_size, mixer.num_value_heads // mixer.num_key_heads
    values = group * mixer.value_size
    by_key_head = {
        **fused_rows("linear_attn.in_proj_qkvz.weight", {"query": size, "key": size, "value": values, "gate": values}),
        **fused_rows("linear_attn.in_proj_ba.weight", {"beta": group, "decay": group}),
    }
    projections = {f"mixer/{name}": name_maps for name, name_maps in by_key_head.items()}
    return {**tensors, **projections, **delta_tensors(mixer)}


# The fields that Qwen3.5 has too, with their common defaults.
DEFAULTS = {
    "head_dim": 256,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "layer_types": None,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}

FAMILY = Family(
    model_type="qwen3_next",
    defaults={
        **sizes(151936, 2048, 5632, 48, 16),
        "num_key_value_heads": 2,
        **DEFAULTS,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "norm_topk_prob": True,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    },
    nullable=frozenset({"layer_types", "mlp_only_layers", "partial_rotary_factor"}),
    layer_kind=layer_kind,
    kinds=frozenset({"full_attention", "linear_attention"}),
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    head_norms=True,
    norm=rms_norm_unit_offset,
    mixer=delta_or_gated_attention,
    feed_forward=where(is_sparse, qwen_gated_shared_experts),
    block_tensors=_tensors,
    elsewhere=lambda config: r"(model\.)?mtp\..*",  # MTP heads, which are not layers of the model
)
