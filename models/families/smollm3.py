"""Describes SmolLM3: Llama without any positions in every fourth layer.

SmolLM3: smol, multilingual, long-context reasoner, Hugging Face 2025; Rope to Nope and Back Again, arXiv 2501.18795.
"""

from dataclasses import replace

from decodax.layers.mixers.gqa import GQAConfig
from decodax.models.families.contract import Family
from decodax.models.families.layer import Fields, Layer, attention, sizes


def _rotates(fields: Fields, index: int) -> bool:
    """A 1 in `no_rope_layers` is a layer that rotates."""
    given = fields["no_rope_layers"]
    if given is not None:
        return index < len(given) and bool(given[index])
    return bool((index + 1) % fields["no_rope_layer_interval"])


def _layer_kind(fields: Fields, index: int) -> str:
    return "full_attention" if fields["sliding_window"] is None or _rotates(fields, index) else "sliding_attention"


def _attention(layer: Layer) -> GQAConfig:
    made = attention(layer)
    return made if _rotates(layer.fields, layer.index) else replace(made, positions=None)


def _unsupported(fields: Fields) -> list[str]:
    given, count = fields["no_rope_layers"], fields["num_hidden_layers"]
    if given is None or len(given) >= count:
        return []
    return [f"no_rope_layers must have a number for each of the {count} layers (num_hidden_layers), got {len(given)}"]


FAMILY = Family(
    model_type="smollm3",
    defaults={
        **sizes(128256, 2048, 11008, 36, 16),
        "num_key_value_heads": 4,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    nullable=frozenset({"sliding_window", "layer_types", "no_rope_layers"}),
    layer_kind=_layer_kind,
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    mlp_bias="mlp_bias",
    mixer=_attention,
    unsupported=_unsupported,
)
