"""Describes Command R: attention and MLP side by side after one LayerNorm without bias, scaled logits.

The release of Command R, Cohere 2024. In Command R+, every head's queries and keys have a norm with weights of its own.
"""

from dataclasses import replace

from decodax.layers.head_norms import HeadNorms
from decodax.layers.mixers.gqa import GQAConfig
from decodax.models.families.contract import Family
from decodax.models.families.layer import Fields, Layer, attention, layer_norm, parallel_one_norm, sizes
from decodax.models.head import HeadConfig


def _scaled_head(fields: Fields) -> HeadConfig:
    return HeadConfig(scale=float(fields["logit_scale"]))


def _attention(layer: Layer) -> GQAConfig:
    norms = HeadNorms(layer.norm, layer.norm, own_weights=True) if layer.fields["use_qk_norm"] else None
    return replace(attention(layer), head_norms=norms)


FAMILY = Family(
    model_type="cohere",
    defaults={
        **sizes(256000, 8192, 22528, 40, 64),
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "logit_scale": 0.0625,
        "use_qk_norm": False,
    },
    nullable=frozenset({"use_qk_norm"}),
    interleaved_rope=True,
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    mixer=_attention,
    norm=layer_norm("layer_norm_eps", bias=False),
    block=parallel_one_norm,
    head=_scaled_head,
)
