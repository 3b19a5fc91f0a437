"""Builds what Qwen3.5's dense and sparse models share: Qwen3-Next's layers, with projections stored apart."""

from decodax.layers.mixers.gated_delta import GatedDeltaConfig
from decodax.models.checkpoints.name_map import fused_rows
from decodax.models.config import BlockConfig
from decodax.models.families.contract import BlockTensors
from decodax.models.families.qwen3_next import delta_tensors

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
