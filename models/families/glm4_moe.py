"""Describes GLM-4.5, 4.6 and 4.7: grouped-query attention, and the experts and MTP head of DeepSeek-V3.

GLM-4.5: Agentic, Reasoning, and Coding (ARC) Foundation Models, arXiv 2508.06471.
"""

from decodax.models.families._deepseek import MTP_HEAD_NAMES, is_sparse, mtp_layers, sigmoid_experts
from decodax.models.families._experts import expert_tensors, where
from decodax.models.families.contract import Family
from decodax.models.families.layer import sizes

FAMILY = Family(
    model_type="glm4_moe",
    defaults={
        **sizes(151552, 4096, 10944, 46, 96),
        "num_key_value_heads": 8,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_qk_norm": False,
        "first_k_dense_replace": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
    },
    aliases={"num_local_experts": "n_routed_experts"},
    ignored=frozenset({"num_nextn_predict_layers", "num_mtp_layers"}),
    qkv_bias="attention_bias",
    head_norms="use_qk_norm",
    feed_forward=where(is_sparse, sigmoid_experts),
    block_tensors=expert_tensors,
    elsewhere=mtp_layers,
    mtp_head=MTP_HEAD_NAMES,
)
