"""Describes Qwen3 (dense): a norm on each head's query and key in place of Qwen2's biases, and a separate head size.

Qwen3 Technical Report, arXiv 2505.09388.
"""

from decodax.models.families.contract import Family
from decodax.models.families.layer import sizes, slides_from_max_window_layers

FAMILY = Family(
    model_type="qwen3",
    defaults={
        **sizes(151936, 4096, 22016, 32, 32),
        "num_key_value_heads": 32,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    nullable=frozenset({"sliding_window", "layer_types"}),
    layer_kind=slides_from_max_window_layers,
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    head_norms=True,
)
