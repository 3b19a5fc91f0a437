"""Describes DeepSeek-V3 and R1: V2 with experts routed by sigmoid scores, and a bias that balances them.

DeepSeek-V3 Technical Report, arXiv 2412.19437. Its MTP head, which predicts two tokens ahead, is not a layer of the
model: `models/mtp_head.py` reads it, and `decoding/drafters/mtp_head.py` drafts with it.
"""

from decodax.models.families._deepseek import (
    DEFAULTS,
    FIXED,
    IGNORED,
    MTP_HEAD_NAMES,
    is_sparse,
    latent_attention,
    mtp_layers,
    sigmoid_experts,
    tensors,
)
from decodax.models.families._experts import where
from decodax.models.families.contract import Family
from decodax.models.families.layer import sizes

FAMILY = Family(
    model_type="deepseek_v3",
    defaults={
        **sizes(129280, 7168, 18432, 61, 128),
        **DEFAULTS,
        "max_position_embeddings": 4096,
        "rope_interleave": True,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "n_group": 8,
        "topk_group": 4,
    },
    nullable=frozenset({"q_lora_rank", "n_group", "topk_group", "rope_interleave", "norm_topk_prob"}),
    aliases={"num_local_experts": "n_routed_experts"},
    ignored=IGNORED | {"num_nextn_predict_layers", "num_mtp_layers"},
    fixed={**FIXED, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    same_as={"head_dim": "qk_rope_head_dim"},  # transformers rotates head_dim coordinates if a file gives it
    rotary_size="qk_rope_head_dim",
    interleaved_rope="rope_interleave",
    mixer=latent_attention,
    feed_forward=where(is_sparse, sigmoid_experts),
    block_tensors=tensors,
    elsewhere=mtp_layers,
    mtp_head=MTP_HEAD_NAMES,
)
