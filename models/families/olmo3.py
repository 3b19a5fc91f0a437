"""Describes OLMo 3: OLMo 2 with a window in three layers of four; the others' rotation may be stretched.

Olmo 3, arXiv 2512.13961. Where a file gives another `rope_theta` than 500,000 beside the rope dictionary, transformers
rotates the layers with a window by 500,000 all the same; here they follow the file.
"""

from decodax.models.families.contract import Family
from decodax.models.families.layer import Fields, post_norm, sizes
from decodax.models.families.olmo2 import BLOCK_TENSORS, norms_across_heads


def _layer_kind(fields: Fields, index: int) -> str:
    return "sliding_attention" if (index + 1) % 4 else "full_attention"


FAMILY = Family(
    model_type="olmo3",
    defaults={
        **sizes(50304, 4096, 11008, 32, 32),
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "sliding_window": 4096,
        "layer_types": None,
    },
    nullable=frozenset({"sliding_window", "layer_types"}),
    layer_kind=_layer_kind,
    rope_by_kind={"full_attention": "rope_theta", "sliding_attention": "rope_theta"},
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    mixer=norms_across_heads,
    block=post_norm,
    block_tensors=BLOCK_TENSORS,
)
