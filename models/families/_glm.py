"""Names the tensors that GLM-4 stores in its own way: gate and up are rows of one tensor."""

from decodax.layers.feed_forward import GatedMLPConfig
from decodax.models.checkpoints.name_map import fused_rows
from decodax.models.config import BlockConfig
from decodax.models.families.contract import BLOCK_TENSORS, BlockTensors
from decodax.models.families.layer import sizes

# The fields of GLM-4's dense models, with their defaults.
DEFAULTS = {
    **sizes(151552, 4096, 13696, 40, 32),
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
    "attention_bias": True,
}


def tensors(block: BlockConfig) -> BlockTensors:
    feed_forward = block.feed_forward_layer
    assert isinstance(feed_forward, GatedMLPConfig)
    gated: dict[str, int] = dict.fromkeys(("feed_forward/gate", "feed_forward/up"), feed_forward.intermediate_size)
    return {**BLOCK_TENSORS, **fused_rows("mlp.gate_up_proj.weight", gated)}
