"""Describes Mixtral: Mistral with eight experts in place of each MLP, two for every token.

Mixtral of Experts, arXiv 2401.04088.
"""

from decodax.layers.moe.layer import MoEConfig
from decodax.models.families._experts import mixtral_tensors, softmax_top_k
from decodax.models.families.contract import Family
from decodax.models.families.layer import Layer, sizes, slides_if_windowed


def _experts(layer: Layer) -> MoEConfig:
    router = softmax_top_k(layer, num_experts="num_local_experts", renormalise=True)
    return MoEConfig(router, layer.fields["intermediate_size"], layer.activation)


FAMILY = Family(
    model_type="mixtral",
    defaults={
        **sizes(32000, 4096, 14336, 32, 32),
        "num_key_value_heads": 8,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    nullable=frozenset({"sliding_window"}),
    aliases={"num_experts": "num_local_experts"},
    layer_kind=slides_if_windowed,
    fixed={"norm_topk_prob": True},
    feed_forward=_experts,
    block_tensors=mixtral_tensors,
)
