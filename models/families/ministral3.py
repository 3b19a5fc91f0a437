"""Describes Ministral 3: Mistral with YaRN, and queries that grow with their position.

Ministral 3, arXiv 2601.08584. Its files are multimodal ones; the text model among them is this family.
"""

from dataclasses import replace

from decodax.layers.mixers.gqa import GQAConfig, QueryGrowth
from decodax.layers.rope import YarnScaling
from decodax.models.families.contract import Family
from decodax.models.families.layer import Layer, attention, sizes, slides_if_windowed

# In files without a rope dictionary.
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def _attention(layer: Layer) -> GQAConfig:
    made, settings, name = attention(layer), layer.rope_settings, "original_max_position_embeddings"
    beta, scaling = settings.get("llama_4_scaling_beta"), layer.rope and layer.rope.scaling
    if not beta:
        return made
    length = scaling.original_length if isinstance(scaling, YarnScaling) else settings.get(name)
    if length is None:
        raise ValueError(f"rope_parameters.{name} is missing: llama_4_scaling_beta needs it")
    return replace(made, query_growth=QueryGrowth(float(beta), int(length)))


FAMILY = Family(
    model_type="ministral3",
    defaults={
        **sizes(131072, 4096, 14336, 34, 32),
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "sliding_window": None,
    },
    nullable=frozenset({"sliding_window"}),
    layer_kind=slides_if_windowed,
    default_rope=_ROPE,
    rope_keys=frozenset({"llama_4_scaling_beta", "max_position_embeddings"}),
    mixer=_attention,
)
