"""Describes Gemma: scaled embeddings, norms whose weight is the deviation from one, heads wider than the model.

Gemma: Open Models Based on Gemini Research and Technology, arXiv 2403.08295.
"""

from dataclasses import replace

from decodax.layers.feed_forward import GatedMLPConfig
from decodax.models.families.contract import Family
from decodax.models.families.layer import Layer, gated_mlp, rms_norm_unit_offset, scaled_embedding, sizes


def _mlp(layer: Layer) -> GatedMLPConfig:
    """The first files say "gelu" and mean its approximation by tanh."""
    made = gated_mlp(layer)
    return replace(made, activation="gelu_tanh") if made.activation == "gelu" else made


FAMILY = Family(
    model_type="gemma",
    defaults={
        **sizes(256000, 3072, 24576, 28, 16),
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
    },
    ignored=frozenset({"hidden_activation"}),  # transformers reads hidden_act
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    norm=rms_norm_unit_offset,
    feed_forward=_mlp,
    embedding=scaled_embedding,
)
