"""Describes Gemma 3 (text): five layers with a window and a rotation of their own, then one over the whole context.

Gemma 3 Technical Report, arXiv 2503.19786.
"""

from decodax.models.families.contract import Family
from decodax.models.families.gemma2 import BLOCK_TENSORS
from decodax.models.families.layer import (
    kind_by_pattern,
    pre_and_post_norm,
    rms_norm_unit_offset,
    scaled_embedding,
    sizes,
)

FAMILY = Family(
    model_type="gemma3_text",
    defaults={
        **sizes(262208, 2304, 9216, 26, 8),
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "layer_types": None,
        "query_pre_attn_scalar": 256,
        "final_logit_softcapping": None,
    },
    nullable=frozenset({"sliding_window", "layer_types", "final_logit_softcapping"}),
    ignored=frozenset({"hidden_act", "cache_implementation", "_sliding_window_pattern"}),
    layer_kind=kind_by_pattern,
    activation_field="hidden_activation",
    score_scale_field="query_pre_attn_scalar",
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    head_norms=True,
    rope_by_kind={"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"},
    norm=rms_norm_unit_offset,
    block=pre_and_post_norm,
    embedding=scaled_embedding,
    block_tensors=BLOCK_TENSORS,
)
