"""Builds what Qwen3.5's dense and sparse models share: Qwen3-Next's layers, with projections stored apart."""

from decodax.layers.mixers.gated_delta import GatedDeltaConfig
from decodax.models.checkpoints.name_map import fused_rows
from decodax.models.config import BlockConfig
from decodax.models.families.contract import BlockTensors
from decodax.models.families.qwen3_next import delta_tensors

# The fields of both, with their common defaults.
DEFAULTS = {
    "head_dim": 256,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "layer_types": None,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
KINDS = frozenset({"full_attention", "linear_attention"})
NULLABLE = frozenset({"layer_types", "partial_rotary_factor"})
IGNORED = frozenset({"mlp_only_layers", "attn_output_gate", "mamba_ssm_dtype", "mtp_num_hidden_layers"})
MTP_HEADS = r"(model\.)?mtp\..*"  # which are not layers of the model


def mixer_tensors(block: BlockConfig) -> BlockTensors:
    """The name maps of a delta layer; none for attention."""
    mixer = block.mixer.layer
    if not isinstance(mixer, GatedDeltaConfig):
        return {}
    keys, values = mixer.num_key_heads * mixer.key_size, mixer.num_value_heads * mixer.value_size
    return {
        **fused_rows("linear_attn.in_proj_qkv.weight", {"mixer/query": keys, "mixer/key": keys, "mixer/value": values}),
        "mixer/gate": "linear_attn.in_proj_z.weight",
        "mixer/beta": "linear_attn.in_proj_b.weight",
        "mixer/decay": "linear_attn.in_proj_a.weight",
        **delta_tensors(mixer),
    }
