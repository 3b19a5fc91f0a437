"""Describes Nemotron-4 and Minitron: LayerNorms whose weight is the deviation from one, MLPs of squared ReLUs.

Nemotron-4 15B Technical Report, arXiv 2402.16819.
"""

from decodax.models.families.contract import Family
from decodax.models.families.layer import layer_norm, plain_mlp, sizes

FAMILY = Family(
    model_type="nemotron",
    defaults={
        **sizes(256000, 6144, 24576, 32, 48),
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    mlp_bias="mlp_bias",
    feed_forward=plain_mlp,
    norm=layer_norm("norm_eps", unit_offset=True),
)
