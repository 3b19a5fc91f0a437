"""Describes Gemma 2: sliding window in every second layer, soft-capped scores and logits, pre- and post-norms.

Gemma 2: Improving Open Language Models at a Practical Size, arXiv 2408.00118.
"""

from decodax.models.families.contract import BLOCK_TENSORS as COMMON_TENSORS
from decodax.models.families.contract import BlockTensors, Family
from decodax.models.families.layer import pre_and_post_norm, rms_norm_unit_offset, scaled_embedding, sizes

BLOCK_TENSORS: BlockTensors = {
    **COMMON_TENSORS,
    "mixer_post_norm/weight": "post_attention_layernorm.weight",
    "feed_forward_norm/weight": "pre_feedforward_layernorm.weight",
    "feed_forward_post_norm/weight": "post_feedforward_layernorm.weight",
}

FAMILY = Family(
    model_type="gemma2",
    defaults={
        **sizes(256000, 2304, 9216, 26, 8),
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "sliding_window": 4096,
        "layer_types": None,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    nullable=frozenset({"sliding_window", "layer_types", "attn_logit_softcapping", "final_logit_softcapping"}),
    # Of two spellings, transformers reads hidden_activation and sliding_window; the cache is decodax's own.
    ignored=frozenset({"hidden_act", "sliding_window_size", "cache_implementation"}),
    layer_kind=lambda fields, index: "full_attention" if index % 2 else "sliding_attention",
    activation_field="hidden_activation",
    score_scale_field="query_pre_attn_scalar",
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    norm=rms_norm_unit_offset,
    block=pre_and_post_norm,
    embedding=scaled_embedding,
    block_tensors=BLOCK_TENSORS,
)
