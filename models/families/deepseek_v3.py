"""Describes DeepSeek-V3 and R1: V2 with experts routed by sigmoid scores, and a bias that balances them.

DeepSeek-V3 Technical Report, arXiv 2412.19437. Its MTP head, which predicts two tokens ahead, is not a layer of the
model: `models/mtp_head.py` reads it, and `decoding/drafters/mtp_head.py` drafts with it.
"""

from decodax.layers.moe.layer import MoEConfig
from decodax.layers.moe.routers.top_k import TopK
from decodax.models.config import ModelConfig
from decodax.models.families._deepseek import (
    DEFAULTS,
    FIXED,
    IGNORED,
    experts,
    is_sparse,
    latent_attention,
    tensors,
)
from decodax.models.families._experts import where
from decodax.models.families.contract import Family, MTPHeadNames
from decodax.models.families.layer import Layer, sizes


def _experts(layer: Layer) -> MoEConfig:
    fields = layer.fields
    router = TopK(
        fields["n_routed_experts"],
        fields["num_experts_per_tok"],
        score="sigmoid",
        renormalise=bool(fields["norm_topk_prob"]),
        scale=float(fields["routed_scaling_factor"]),
        selection_bias=True,
        num_groups=fields["n_group"],
        num_groups_kept=fields["topk_group"],
        group_score="top2_sum",
    )
    return experts(layer, router)


def _mtp_layers(config: ModelConfig) -> str:
    """The names of MTP heads, which are numbered after the model's layers."""
    return rf"model\.layers\.({'|'.join(str(config.num_layers + index) for index in range(8))})\..*"


MTP_HEAD_NAMES = MTPHeadNames(
    prefix="model.layers.{}.",
    tensors={
        "embedding_norm/weight": "enorm.weight",
        "hidden_norm/weight": "hnorm.weight",
        "join": "eh_proj.weight",
        "final_norm/weight": "shared_head.norm.weight",
    },
    copies=r"(?:embed_tokens|shared_head\.head)\..*",
)

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
    mixer=latent_attention,
    feed_forward=where(is_sparse, _experts),
    block_tensors=tensors,
    elsewhere=_mtp_layers,
    mtp_head=MTP_HEAD_NAMES,
)
