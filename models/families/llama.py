"""Describes Llama 1 to 3.x and the many models of its architecture (SmolLM, TinyLlama, Yi, DeepSeek LLM, ...).

LLaMA, arXiv 2302.13971; Llama 2, arXiv 2307.09288; The Llama 3 Herd of Models, arXiv 2407.21783.
"""

from decodax.models.families.contract import Family
from decodax.models.families.layer import sizes

FAMILY = Family(
    model_type="llama",
    defaults={
        **sizes(32000, 4096, 11008, 32, 32),
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    mlp_bias="mlp_bias",
)
