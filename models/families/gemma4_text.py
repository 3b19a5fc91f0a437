"""Describes Gemma 4 (text, dense): layers without a window have wider heads, of which some rotates, keys as values.

From the release of Gemma 4. Its sizes with an embedding per layer (E2B, E4B) and with experts (26B-A4B) are not read.
"""

from dataclasses import replace

from decodax.layers.head_norms import HeadNorms
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.norm import RMSNormConfig
from decodax.models.config import BlockConfig
from decodax.models.families.contract import Family
from decodax.models.families.gemma2 import BLOCK_TENSORS
from decodax.models.families.layer import Fields, Layer, attention, pre_and_post_norm, scaled_embedding, sizes

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


def _block(layer: Layer) -> BlockConfig:
    return replace(pre_and_post_norm(layer), output_scale=True)


def _unsupported(fields: Fields) -> list[str]:
    found = []
    if fields["hidden_size_per_layer_input"]:
        found.append(
            f"hidden_size_per_layer_input must be 0, got {fields['hidden_size_per_layer_input']}: models with an "
            "embedding per layer (Gemma 4 E2B and E4B) are not read"
        )
    if fields["num_kv_shared_layers"]:
        found.append(f"num_kv_shared_layers must be 0, got {fields['num_kv_shared_layers']}")
    found += [f"{name} must be false, got true" for name in ("enable_moe_block", "use_double_wide_mlp") if fields[name]]
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
    },
    nullable=frozenset({"num_global_key_value_heads", "layer_types", "final_logit_softcapping"}),
    # Of experts and of embeddings per layer.
    ignored=frozenset({"vocab_size_per_layer_input", "num_experts", "top_k_experts", "moe_intermediate_size"}),
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
    block=_block,
    embedding=scaled_embedding,
    block_tensors={**BLOCK_TENSORS, "output_scale": "layer_scalar"},
)
