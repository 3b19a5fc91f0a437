"""Describes DeepSeek-V2: latent attention (MLA), softmax-routed experts, group-limited in the largest models.

DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model, arXiv 2405.04434.
"""

from decodax.layers.moe.layer import MoEConfig
from decodax.layers.moe.routers.top_k import TopK
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
from decodax.models.families.contract import Family
from decodax.models.families.layer import Layer, sizes


def _experts(layer: Layer) -> MoEConfig:
    fields = layer.fields
    grouped = fields["topk_method"] == "group_limited_greedy"
    router = TopK(
        fields["n_routed_experts"],
        fields["num_experts_per_tok"],
        score="softmax",
        renormalise=False,  # as in transformers, whatever norm_topk_prob says
        scale=float(fields["routed_scaling_factor"]),
        num_groups=fields["n_group"] if grouped else None,
        num_groups_kept=fields["topk_group"] if grouped else None,
        group_score="max",
    )
    return experts(layer, router)


FAMILY = Family(
    model_type="deepseek_v2",
    defaults={
        **sizes(102400, 4096, 11008, 32, 32),
        **DEFAULTS,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "first_k_dense_replace": 0,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": None,
        "moe_intermediate_size": 1407,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "n_group": None,
        "topk_group": None,
    },
    nullable=frozenset({"q_lora_rank", "n_group", "topk_group"}),
    aliases={"num_experts": "n_routed_experts"},
    ignored=IGNORED | {"norm_topk_prob", "head_dim"},
    fixed={**FIXED, "scoring_func": "softmax"},
    rotary_size="qk_rope_head_dim",
    interleaved_rope=True,
    mlp_bias="mlp_bias",
    mixer=latent_attention,
    feed_forward=where(is_sparse, _experts),
    block_tensors=tensors,
)
