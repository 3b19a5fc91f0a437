"""Describes Qwen3.5 with experts (text): Qwen3.5's layers, each with routed experts and a gated shared one.

Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv 2412.06464; Qwen3.5 has no paper yet.
"""

from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.moe.layer import MoEConfig
from decodax.models.config import BlockConfig
from decodax.models.families import _qwen3_5 as qwen3_5
from decodax.models.families._experts import softmax_top_k
from decodax.models.families.contract import BlockTensors, Family
from decodax.models.families.layer import Layer, rms_norm_unit_offset
from decodax.models.families.qwen2_moe import shared_expert_tensors
from decodax.models.families.qwen3_next import DEFAULTS, delta_or_gated_attention, layer_kind


def _experts(layer: Layer) -> MoEConfig:
    fields, activation = layer.fields, layer.activation
    shared = GatedMLPConfig(fields["shared_expert_intermediate_size"], activation)
    router = softmax_top_k(layer, renormalise=True)
    return MoEConfig(router, fields["moe_intermediate_size"], activation, shared=shared, shared_gate=True)


def _tensors(block: BlockConfig) -> BlockTensors:
    return {**shared_expert_tensors(block), **qwen3_5.mixer_tensors(block)}


FAMILY = Family(
    model_type="qwen3_5_moe_text",
    defaults={
        "vocab_size": 248320,
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        **DEFAULTS,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    nullable=qwen3_5.NULLABLE,
    ignored=qwen3_5.IGNORED,
    layer_kind=layer_kind,
    kinds=qwen3_5.KINDS,
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    head_norms=True,
    norm=rms_norm_unit_offset,
    mixer=delta_or_gated_attention,
    feed_forward=_experts,
    block_tensors=_tensors,
    elsewhere=lambda config: qwen3_5.MTP_HEADS,
)
