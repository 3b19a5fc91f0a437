"""Describes StableLM 3B and StableLM 2: LayerNorms, a gated MLP, a quarter of each head rotates.

Stable LM 2 1.6B Technical Report, arXiv 2402.17834. StableLM 2 12B has attention and MLP side by side after one norm,
and every head's queries and keys have a norm of their own.
"""

from dataclasses import replace

from decodax.layers.head_norms import HeadNorms
from decodax.layers.mixers.gqa import GQAConfig
from decodax.models.checkpoints.name_map import stack
from decodax.models.config import BlockConfig
from decodax.models.families.contract import BLOCK_TENSORS, BlockTensors, Family
from decodax.models.families.layer import Layer, attention, layer_norm, parallel_one_norm, pre_norm, sizes

_head_norm = layer_norm("layer_norm_eps", bias=False)


def _attention(layer: Layer) -> GQAConfig:
    norm = _head_norm(layer.fields)
    norms = HeadNorms(norm, norm, own_weights=True) if layer.fields["qk_layernorm"] else None
    return replace(attention(layer), head_norms=norms)


def _block(layer: Layer) -> BlockConfig:
    return parallel_one_norm(layer) if layer.fields["use_parallel_residual"] else pre_norm(layer)


def _tensors(block: BlockConfig) -> BlockTensors:
    """The tensor names; each head's norms are tensors of their own."""
    mixer = block.mixer.layer
    assert isinstance(mixer, GQAConfig)
    return {
        **BLOCK_TENSORS,
        "mixer/query_norm/weight": (stack("self_attn.q_layernorm.norms.{}.weight", mixer.num_heads),),
        "mixer/key_norm/weight": (stack("self_attn.k_layernorm.norms.{}.weight", mixer.num_kv_heads),),
    }


FAMILY = Family(
    model_type="stablelm",
    defaults={
        **sizes(50304, 2560, 6912, 32, 32),
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "tie_word_embeddings": False,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
    },
    ignored=frozenset({"rotary_scaling_factor"}),
    qkv_bias="use_qkv_bias",
    mixer=_attention,
    norm=layer_norm("layer_norm_eps"),
    block=_block,
    block_tensors=_tensors,
)
