"""Describes ERNIE 4.5 (dense): Llama whose heads rotate neighbours.

ERNIE 4.5 Technical Report, Baidu 2025.
"""

from decodax.models.families.contract import Family
from decodax.models.families.layer import sizes

FAMILY = Family(
    model_type="ernie4_5",
    defaults={
        **sizes(103424, 1024, 3072, 18, 16),
        "num_key_value_heads": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "use_bias": False,
    },
    nullable=frozenset({"use_bias"}),
    interleaved_rope=True,
    qkv_bias="use_bias",
    out_bias="use_bias",
    mlp_bias="use_bias",
)
