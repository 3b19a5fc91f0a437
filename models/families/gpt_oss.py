"""Describes gpt-oss: sliding window in every second layer, a sink per head, biases in router and experts.

gpt-oss-120b & gpt-oss-20b Model Card, arXiv 2508.10925.
"""

from dataclasses import replace

from decodax.layers.feed_forward import ClampedSwiGLU
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.moe.layer import MoEConfig
from decodax.layers.moe.routers.top_k import TopK
from decodax.models.checkpoints.name_map import NameMaps, PeriodicSlice, TensorSlice
from decodax.models.config import BlockConfig
from decodax.models.families.contract import BLOCK_TENSORS, BlockTensors, Family
from decodax.models.families.layer import Layer, attention, sizes


def _attention(layer: Layer) -> GQAConfig:
    return replace(attention(layer), sinks=True)


def _experts(layer: Layer) -> MoEConfig:
    fields = layer.fields
    num_experts, per_token = fields["num_local_experts"], fields["num_experts_per_tok"]
    router = TopK(num_experts, per_token, score="softmax", renormalise=True, router_bias=True)
    activation = ClampedSwiGLU(float(fields["swiglu_alpha"]), float(fields["swiglu_limit"]))
    return MoEConfig(router, fields["intermediate_size"], activation, bias=True)


def _tensors(block: BlockConfig) -> BlockTensors:
    """Gate and up alternate. Plain weights are stored [E, inputs, outputs], those in mxfp4 [E, outputs, inputs]."""

    def alternating(first: int) -> dict[str, NameMaps]:
        part, name = PeriodicSlice(2, first, first + 1), "mlp.experts.gate_up_proj"
        plain = TensorSlice(name, part=part, axis=2, transposed=True)
        packed = TensorSlice(f"{name}_blocks", part=part, axis=1)
        return {"": ((packed,), (plain,)), "_bias": ((TensorSlice(f"{name}_bias", part=part, axis=1),),)}

    down = "mlp.experts.down_proj"
    return {
        **BLOCK_TENSORS,
        "mixer/sinks": "self_attn.sinks",
        "feed_forward/router/weight": "mlp.router.weight",
        "feed_forward/router/bias": "mlp.router.bias",
        **{f"feed_forward/experts/gate{end}": name_maps for end, name_maps in alternating(0).items()},
        **{f"feed_forward/experts/up{end}": name_maps for end, name_maps in alternating(1).items()},
        "feed_forward/experts/down": ((TensorSlice(f"{down}_blocks"),), (TensorSlice(down, transposed=True),)),
        "feed_forward/experts/down_bias": f"{down}_bias",
    }


FAMILY = Family(
    model_type="gpt_oss",
    defaults={
        **sizes(201088, 2880, 2880, 36, 64),
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": None,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
    },
    nullable=frozenset({"sliding_window", "layer_types"}),
    aliases={"num_experts": "num_local_experts"},
    # Repeated under another name: experts per token, and the length before YaRN. The activation is fixed.
    ignored=frozenset({"experts_per_token", "initial_context_length", "hidden_act"}),
    layer_kind=lambda fields, index: "full_attention" if index % 2 else "sliding_attention",
    default_rope={
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    mixer=_attention,
    fixed={"norm_topk_prob": True},
    feed_forward=_experts,
    block_tensors=_tensors,
)
