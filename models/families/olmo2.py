"""Describes OLMo 2: norms after the layers instead of before, and one norm over all heads of queries and of keys.

2 OLMo 2 Furious, arXiv 2501.00656.
"""

from dataclasses import replace

from decodax.layers.head_norms import HeadNorms
from decodax.layers.mixers.gqa import GQAConfig
from decodax.models.families.contract import BLOCK_TENSORS as COMMON_TENSORS
from decodax.models.families.contract import BlockTensors, Family
from decodax.models.families.layer import Layer, attention, post_norm, sizes


def norms_across_heads(layer: Layer) -> GQAConfig:
    """Attention with one norm over all queries and one over all keys."""
    return replace(attention(layer), head_norms=HeadNorms(layer.norm, layer.norm, across_heads=True))


BLOCK_TENSORS: BlockTensors = {
    **COMMON_TENSORS,
    "mixer_post_norm/weight": "post_attention_layernorm.weight",
    "feed_forward_post_norm/weight": "post_feedforward_layernorm.weight",
}

FAMILY = Family(
    model_type="olmo2",
    defaults={
        **sizes(50304, 4096, 11008, 32, 32),
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
    },
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    mixer=norms_across_heads,
    block=post_norm,
    block_tensors=BLOCK_TENSORS,
)
