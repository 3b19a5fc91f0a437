"""Describes Qwen3 with experts: 128 of them, eight for every token, no shared one.

Qwen3 Technical Report, arXiv 2505.09388.
"""

from decodax.models.families._experts import expert_tensors, is_sparse, qwen_experts, where
from decodax.models.families.contract import Family
from decodax.models.families.layer import sizes, slides_if_windowed

FAMILY = Family(
    model_type="qwen3_moe",
    defaults={
        **sizes(151936, 2048, 6144, 24, 32),
        "num_key_value_heads": 4,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    },
    nullable=frozenset({"sliding_window", "mlp_only_layers"}),
    aliases={"num_local_experts": "num_experts"},
    ignored=frozenset({"max_window_layers", "shared_expert_intermediate_size"}),
    layer_kind=slides_if_windowed,
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    head_norms=True,
    feed_forward=where(is_sparse, qwen_experts),
    block_tensors=expert_tensors,
)
