"""Describes Seed-OSS: Llama with biases of queries, keys and values, and a head size of its own."""

from decodax.models.families.contract import Family
from decodax.models.families.layer import sizes

FAMILY = Family(
    model_type="seed_oss",
    defaults={
        **sizes(155136, 4096, 27648, 64, 80),
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 524288,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
    },
    qkv_bias="attention_bias",
    out_bias="attention_out_bias",
    mlp_bias="mlp_bias",
)
