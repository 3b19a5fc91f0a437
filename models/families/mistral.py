"""Describes Mistral 7B and its successors of that architecture: Llama with a sliding window in every layer, or none.

Mistral 7B, arXiv 2310.06825.
"""

from decodax.models.families.contract import Family
from decodax.models.families.layer import sizes, slides_if_windowed

FAMILY = Family(
    model_type="mistral",
    defaults={
        **sizes(32000, 4096, 14336, 32, 32),
        "num_key_value_heads": 8,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
    },
    nullable=frozenset({"sliding_window"}),
    layer_kind=slides_if_windowed,
)
