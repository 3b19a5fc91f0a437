"""Describes Qwen2 and Qwen2.5: biases on query, key and value; sliding window possible from `max_window_layers` on.

Qwen2 Technical Report, arXiv 2407.10671; Qwen2.5 Technical Report, arXiv 2412.15115.
"""

from decodax.models.families.contract import Family
from decodax.models.families.layer import sizes, slides_from_max_window_layers

FAMILY = Family(
    model_type="qwen2",
    defaults={
        **sizes(151936, 4096, 22016, 32, 32),
        "num_key_value_heads": 32,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    nullable=frozenset({"sliding_window", "layer_types"}),
    layer_kind=slides_from_max_window_layers,
    # Query, key and value always have biases, and no other product has one.
    ignored=frozenset({"attention_bias", "qkv_bias"}),
    qkv_bias=True,
)
