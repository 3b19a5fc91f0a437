"""Describes OLMoE: 64 small experts, eight for every token, and norms over the queries and keys of all heads at once.

OLMoE: Open Mixture-of-Experts Language Models, arXiv 2409.02060.
"""

from dataclasses import replace

from decodax.layers.head_norms import HeadNorms
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.moe.layer import MoEConfig
from decodax.models.families._experts import expert_tensors, softmax_top_k
from decodax.models.families.contract import Family
from decodax.models.families.layer import Layer, attention, sizes


def _attention(layer: Layer) -> GQAConfig:
    clip, norms = layer.fields["clip_qkv"], HeadNorms(layer.norm, layer.norm, across_heads=True)
    return replace(attention(layer), head_norms=norms, clip=None if clip is None else float(clip))


def _experts(layer: Layer) -> MoEConfig:
    return MoEConfig(softmax_top_k(layer), layer.fields["intermediate_size"], layer.activation)


FAMILY = Family(
    model_type="olmoe",
    defaults={
        **sizes(50304, 2048, 2048, 16, 16),
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "clip_qkv": None,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    nullable=frozenset({"clip_qkv"}),
    aliases={"num_local_experts": "num_experts"},
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    mixer=_attention,
    feed_forward=_experts,
    block_tensors=expert_tensors,
)
