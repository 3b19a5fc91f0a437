"""Describes EXAONE 4.0: norms after attention and MLP, and rotation in the layers with a window alone.

EXAONE 4.0: Unified Large Language Models Integrating Non-reasoning and Reasoning Modes, arXiv 2507.11407. Models
without windows rotate in all layers.
"""

from dataclasses import replace

from decodax.layers.mixers.gqa import GQAConfig
from decodax.models.families.contract import BLOCK_TENSORS, Family
from decodax.models.families.layer import Fields, Layer, attention, post_norm, sizes, slides_by_pattern


def _unsupported(fields: Fields) -> list[str]:
    pattern = fields["sliding_window_pattern"]
    if fields["sliding_window"] is None or fields["layer_types"] is not None or pattern is not None:
        return []
    return ["sliding_window_pattern is needed where sliding_window is given and layer_types is not"]


def _attention(layer: Layer) -> GQAConfig:
    made = attention(layer)
    rotates = layer.kind == "sliding_attention" or layer.fields["sliding_window"] is None
    return made if rotates else replace(made, positions=None)


FAMILY = Family(
    model_type="exaone4",
    defaults={
        **sizes(102400, 4096, 16384, 32, 32),
        "num_key_value_heads": 32,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "layer_types": None,
    },
    nullable=frozenset({"sliding_window", "sliding_window_pattern", "layer_types"}),
    layer_kind=slides_by_pattern,
    head_norms=True,
    mixer=_attention,
    unsupported=_unsupported,
    block=post_norm,
    block_tensors={
        **BLOCK_TENSORS,
        "mixer_post_norm/weight": "post_attention_layernorm.weight",
        "feed_forward_post_norm/weight": "post_feedforward_layernorm.weight",
    },
)
