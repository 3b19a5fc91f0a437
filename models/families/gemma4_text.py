"""Describes Gemma 4 (text): layers without a window have wider heads, of which some rotates, keys as values.

From the release of Gemma 4. Its sizes with an embedding per layer (E2B, E4B) are not read.
"""

from dataclasses import replace

from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.head_norms import HeadNorms
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.moe.layer import MoEConfig, MoENorms
from decodax.layers.moe.routers.top_k import TopK
from decodax.layers.norm import RMSNormConfig
from decodax.models.checkpoints.name_map import fused_rows
from decodax.models.config import BlockConfig, SubLayer
from decodax.models.families.contract import BlockTensors, Family
from decodax.models.families.gemma2 import BLOCK_TENSORS
from decodax.models.families.layer import (
    Fields,
    Layer,
    attention,
    gated_mlp,
    pre_and_post_norm,
    scaled_embedding,
    sizes,
)

_SLIDES = 6  # every sixth layer has no window, and neither has the last


def _layer_kind(fields: Fields, index: int) -> str:
    is_full = (index + 1) % _SLIDES == 0 or index + 1 == fields["num_hidden_layers"]
    return "full_attention" if is_full else "sliding_attention"


def _attention(layer: Layer) -> GQAConfig:
    fields, no_weight = layer.fields, RMSNormConfig(float(layer.fields["rms_norm_eps"]), has_weight=False)
    made = replace(attention(layer), scale=1.0, head_norms=HeadNorms(layer.norm, layer.norm, no_weight))
    if layer.kind == "sliding_attention":
        return made
    shares, heads = fields["attention_k_eq_v"], fields["num_global_key_value_heads"]
    num_kv_heads = made.num_kv_heads if heads is None or not shares else heads
    return replace(made, num_kv_heads=num_kv_heads, values_are_keys=shares)


def _feed_forward(layer: Layer) -> GatedMLPConfig | MoEConfig:
    """A gated MLP, and in the models with experts these beside it."""
    mlp, fields = gated_mlp(layer), layer.fields
    if not fields["enable_moe_block"]:
        return mlp
    scale = float(fields["hidden_size"]) ** -0.5
    options = {"renormalise": True, "logit_scale": scale, "expert_scale": True}
    router = TopK(fields["num_experts"], fields["top_k_experts"], "softmax", **options)
    norms = MoENorms(*[layer.norm] * 5)
    return MoEConfig(router, fields["moe_intermediate_size"], layer.activation, shared=mlp, norms=norms)


def _block(layer: Layer) -> BlockConfig:
    block = replace(pre_and_post_norm(layer), output_scale=True)
    if not layer.fields["enable_moe_block"]:
        return block
    return replace(block, feed_forward=SubLayer(_feed_forward(layer), None, layer.norm))


def _tensors(block: BlockConfig) -> BlockTensors:
    tensors = {**BLOCK_TENSORS, "output_scale": "layer_scalar"}
    experts = block.feed_forward_layer
    if not isinstance(experts, MoEConfig):
        return tensors
    width = experts.intermediate_size
    halves = fused_rows("experts.gate_up_proj", {"gate": width, "up": width}, axis=1)
    return {
        **tensors,
        **{f"feed_forward/shared/{name}": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
        **{f"feed_forward/experts/{name}": name_maps for name, name_maps in halves.items()},
        "feed_forward/experts/down": "experts.down_proj",
        "feed_forward/router/weight": "router.proj.weight",
        "feed_forward/router/expert_scale": "router.per_expert_scale",
        "feed_forward/router_norm/weight": "router.scale",
        "feed_forward/shared_norm/weight": "pre_feedforward_layernorm.weight",
        "feed_forward/shared_post_norm/weight": "post_feedforward_layernorm_1.weight",
        "feed_forward/experts_norm/weight": "pre_feedforward_layernorm_2.weight",
        "feed_forward/experts_post_norm/weight": "post_feedforward_layernorm_2.weight",
    }


def _unsupported(fields: Fields) -> list[str]:
    found = []
    if fields["hidden_size_per_layer_input"]:
        found.append(
            f"hidden_size_per_layer_input must be 0, got {fields['hidden_size_per_layer_input']}: models with an "
            "embedding per layer (Gemma 4 E2B and E4B) are not read"
        )
    if fields["num_kv_shared_layers"]:
        found.append(f"num_kv_shared_layers must be 0, got {fields['num_kv_shared_layers']}")
    if fields["use_double_wide_mlp"]:
        found.append("use_double_wide_mlp must be false, got true")
    heads, shared_by = fields["num_attention_heads"], fields["num_global_key_value_heads"]
    if shared_by is not None and heads % shared_by:
        found.append(f"num_global_key_value_heads must divide num_attention_heads ({heads}), got {shared_by}")
    experts = ("num_experts", "top_k_experts", "moe_intermediate_size")
    if fields["enable_moe_block"]:
        found += [f"{name} is needed with enable_moe_block" for name in experts if fields[name] is None]
    return found


FAMILY = Family(
    model_type="gemma4_text",
    defaults={
        **sizes(262144, 2304, 9216, 30, 8),
        "num_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": None,
        "attention_k_eq_v": False,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "sliding_window": 512,
        "layer_types": None,
        "final_logit_softcapping": None,
        "hidden_size_per_layer_input": 256,
        "num_kv_shared_layers": 0,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
    },
    nullable=frozenset(
        {"num_global_key_value_heads", "layer_types", "final_logit_softcapping"}
        | {"num_experts", "top_k_experts", "moe_intermediate_size"}
    ),
    ignored=frozenset({"vocab_size_per_layer_input"}),  # of embeddings per layer
    # Tokens of images see each other with "vision", which text has none of.
    fixed={"use_bidirectional_attention": "vision"},
    layer_kind=_layer_kind,
    activation_field="hidden_activation",
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    default_rope={
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    },
    rope_by_kind={"full_attention": 1000000.0, "sliding_attention": 10000.0},
    head_sizes={"full_attention": "global_head_dim"},
    unsupported=_unsupported,
    mixer=_attention,
    feed_forward=_feed_forward,
    block=_block,
    embedding=scaled_embedding,
    block_tensors=_tensors,
)
