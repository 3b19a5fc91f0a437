"""Describes Phi-3 and Phi-4: Llama with fused projections in its files; longrope, and in Phi-4-mini partial rotation.

Phi-3 Technical Report, arXiv 2404.14219. Where a row first exceeds the original length, transformers computes its cache
anew with the long factors; here the tokens before keep the rotation that they had, as in all families.
"""

from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.mixers.gqa import GQAConfig
from decodax.models.checkpoints.name_map import fused_rows
from decodax.models.config import BlockConfig
from decodax.models.families.contract import BLOCK_TENSORS, BlockTensors, Family
from decodax.models.families.layer import sizes, slides_if_windowed


def _tensors(block: BlockConfig) -> BlockTensors:
    """The tensor names; queries, keys and values are rows of one tensor, and so are gate and up."""
    mixer, feed_forward = block.mixer.layer, block.feed_forward_layer
    assert isinstance(mixer, GQAConfig) and isinstance(feed_forward, GatedMLPConfig)
    wide, narrow = mixer.num_heads * mixer.head_size, mixer.num_kv_heads * mixer.head_size
    inner = feed_forward.intermediate_size

    attention = {"mixer/query": wide, "mixer/key": narrow, "mixer/value": narrow}
    gated = {"feed_forward/gate": inner, "feed_forward/up": inner}
    fused = fused_rows("self_attn.qkv_proj.weight", attention) | fused_rows("mlp.gate_up_proj.weight", gated)
    return {**BLOCK_TENSORS, **fused}


FAMILY = Family(
    model_type="phi3",
    defaults={
        **sizes(32064, 3072, 8192, 32, 32),
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "tie_word_embeddings": False,
        "sliding_window": None,
    },
    nullable=frozenset({"sliding_window"}),
    layer_kind=slides_if_windowed,
    block_tensors=_tensors,
)
