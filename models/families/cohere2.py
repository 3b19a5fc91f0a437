"""Describes Command R7B and Command A: Command R with a window in three layers of four, and rotation in those alone.

Command A: An Enterprise-Ready Large Language Model, arXiv 2504.00698.
"""

from dataclasses import replace

from decodax.layers.mixers.gqa import GQAConfig
from decodax.models.families import cohere
from decodax.models.families.layer import Layer, attention, slides_by_pattern


def _attention(layer: Layer) -> GQAConfig:
    made = attention(layer)
    return made if layer.kind == "sliding_attention" else replace(made, positions=None)


FAMILY = replace(
    cohere.FAMILY,
    model_type="cohere2",
    defaults={
        **{name: value for name, value in cohere.FAMILY.defaults.items() if name != "use_qk_norm"},
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "layer_types": None,
    },
    nullable=frozenset({"sliding_window", "layer_types"}),
    # What the files of the release say of the same architecture.
    ignored=frozenset({"layer_switch", "use_embedding_sharing", "use_parallel_embedding"}),
    fixed={
        "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj",
        "use_gated_activation": True,
        "use_parallel_block": True,
    },
    layer_kind=slides_by_pattern,
    mixer=_attention,
)
