"""Describes MiniMax-M2: softmax attention with norms across heads, half of a head rotates, experts by sigmoid scores.

The release of MiniMax-M2, MiniMax 2025.
"""

from dataclasses import replace

from decodax.layers.head_norms import HeadNorms
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.moe.layer import MoEConfig
from decodax.layers.moe.routers.top_k import TopK
from decodax.models.config import BlockConfig
from decodax.models.families._experts import either, mixtral_tensors
from decodax.models.families.contract import BlockTensors, Family
from decodax.models.families.layer import Fields, Layer, attention, sizes


def _attention(layer: Layer) -> GQAConfig:
    return replace(attention(layer), head_norms=HeadNorms(layer.norm, layer.norm, across_heads=True))


def _experts(layer: Layer) -> MoEConfig:
    fields = layer.fields
    router = TopK(
        fields["num_local_experts"],
        fields["num_experts_per_tok"],
        score="sigmoid",
        renormalise=True,
        selection_bias=True,
    )
    return MoEConfig(router, fields["intermediate_size"], layer.activation)


def _head_size(fields: Fields) -> int:
    return fields["head_dim"] or fields["hidden_size"] // fields["num_attention_heads"]


def _share_that_rotates(fields: Fields) -> float:
    """The files of the release give the number of coordinates."""
    return 1.0 if fields["rotary_dim"] is None else fields["rotary_dim"] / _head_size(fields)


def _unsupported(fields: Fields) -> list[str]:
    rotating, size = fields["rotary_dim"], _head_size(fields)
    if rotating is None or (rotating % 2 == 0 and rotating <= size):
        return []
    return [f"rotary_dim must be even and at most the {size} coordinates of a head (head_dim), got {rotating}"]


def _tensors(block: BlockConfig) -> BlockTensors:
    bias = either("block_sparse_moe.e_score_correction_bias", "mlp.e_score_correction_bias")
    return {**mixtral_tensors(block), "feed_forward/router/selection_bias": bias}


FAMILY = Family(
    model_type="minimax_m2",
    defaults={
        **sizes(200064, 3072, 1536, 62, 48),
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 196608,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000.0,
        "partial_rotary_factor": None,
        "rotary_dim": None,
        "tie_word_embeddings": False,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
    },
    nullable=frozenset({"rotary_dim"}),
    aliases={"num_experts": "num_local_experts"},
    # Of MTP heads, which the release leaves out; of layers that are all alike.
    ignored=frozenset({"use_mtp", "num_mtp_modules", "mtp_transformer_layers", "attn_type_list"}),
    fixed={"scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True, "qk_norm_type": "per_layer"}
    | {"shared_intermediate_size": 0},
    mixer=_attention,
    feed_forward=_experts,
    derived={"partial_rotary_factor": _share_that_rotates},
    unsupported=_unsupported,
    block_tensors=_tensors,
)
