"""Builds what DeepSeek-V2 and V3 share: latent attention (MLA), shared experts, and their tensor names.

GLM-4.5 has V3's experts and MTP head, too.
"""

import math

from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.mixers.mla import MLAConfig
from decodax.layers.moe.layer import MoEConfig
from decodax.layers.moe.routers.top_k import TopK
from decodax.layers.norm import RMSNormConfig
from decodax.models.checkpoints.name_map import NameMaps, PeriodicSlice, TensorSlice
from decodax.models.config import BlockConfig, ModelConfig
from decodax.models.families._experts import expert_tensors
from decodax.models.families.contract import BlockTensors, MTPHeadNames
from decodax.models.families.layer import Layer

LATENT_NORM = RMSNormConfig(1e-6)  # transformers' own, whatever rms_norm_eps says

# The fields of both, with their common defaults.
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
FIXED = {"moe_layer_freq": 1}
# Derived from the sizes within a head; for training; for another program's parallelism.
IGNORED = frozenset({"qk_head_dim", "aux_loss_alpha", "seq_aux", "ep_size", "num_key_value_heads"})


def latent_attention(layer: Layer) -> MLAConfig:
    """Latent attention; with YaRN, `mscale_all_dim` scales the scores, too."""
    fields = layer.fields
    scale = (fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]) ** -0.5
    all_dims = layer.rope_settings.get("mscale_all_dim", 0)
    factor = layer.rope_settings.get("factor", 1.0)
    assert layer.rope is not None
    if layer.rope.scaling is not None and all_dims and factor > 1:
        scale *= (0.1 * all_dims * math.log(factor) + 1) ** 2
    return MLAConfig(
        num_heads=fields["num_attention_heads"],
        nope_size=fields["qk_nope_head_dim"],
        value_size=fields["v_head_dim"],
        latent_rank=fields["kv_lora_rank"],
        query_rank=fields["q_lora_rank"],
        rope=layer.rope,
        scale=scale,
        norm=LATENT_NORM,
        bias=fields["attention_bias"],
    )


def experts(layer: Layer, router: TopK) -> MoEConfig:
    """Routed experts beside shared ones, which are one MLP of their summed width."""
    fields, size = layer.fields, layer.fields["moe_intermediate_size"]
    num_shared = fields["n_shared_experts"] or 0
    bias = layer.flag(layer.family.mlp_bias)
    shared = GatedMLPConfig(size * num_shared, layer.activation, bias) if num_shared else None
    return MoEConfig(router, size, layer.activation, shared=shared)


def is_sparse(layer: Layer) -> bool:
    return layer.index >= layer.fields["first_k_dense_replace"]


def sigmoid_experts(layer: Layer) -> MoEConfig:
    """Experts routed by sigmoid scores, with a bias that balances them."""
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


def mtp_layers(config: ModelConfig) -> str:
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


def tensors(block: BlockConfig) -> BlockTensors:
    """The tensor names; kv_b_proj holds each head's key weights, then its value weights."""
    mixer = block.mixer.layer
    assert isinstance(mixer, MLAConfig)
    size = mixer.nope_size + mixer.value_size

    def slice_of_head(start: int, stop: int) -> NameMaps:
        return ((TensorSlice("self_attn.kv_b_proj.weight", part=PeriodicSlice(size, start, stop)),),)

    return {
        **expert_tensors(block),
        "mixer/query_down": "self_attn.q_a_proj.weight",
        "mixer/query_down_bias": "self_attn.q_a_proj.bias",
        "mixer/query_norm/weight": "self_attn.q_a_layernorm.weight",
        "mixer/query_up": "self_attn.q_b_proj.weight",
        "mixer/latent_down": "self_attn.kv_a_proj_with_mqa.weight",
        "mixer/latent_down_bias": "self_attn.kv_a_proj_with_mqa.bias",
        "mixer/latent_norm/weight": "self_attn.kv_a_layernorm.weight",
        "mixer/key_up": slice_of_head(0, mixer.nope_size),
        "mixer/value_up": slice_of_head(mixer.nope_size, size),
    }
