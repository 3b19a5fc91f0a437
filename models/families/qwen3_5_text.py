"""Describes Qwen3.5 (dense, text): the gated delta rule in three layers of four, gated attention in the fourth.

Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv 2412.06464; Qwen3.5 has no paper yet.
"""

from decodax.models.config import BlockConfig
from decodax.models.families import _qwen3_5 as qwen3_5
from decodax.models.families.contract import BLOCK_TENSORS, BlockTensors, Family
from decodax.models.families.layer import rms_norm_unit_offset, sizes
from decodax.models.families.qwen3_next import DEFAULTS, delta_or_gated_attention, layer_kind


def _tensors(block: BlockConfig) -> BlockTensors:
    return {**BLOCK_TENSORS, **qwen3_5.mixer_tensors(block)}


FAMILY = Family(
    model_type="qwen3_5_text",
    defaults={**sizes(248320, 4096, 12288, 32, 16), "num_key_value_heads": 4, **DEFAULTS},
    nullable=qwen3_5.NULLABLE,
    ignored=qwen3_5.IGNORED,
    layer_kind=layer_kind,
    kinds=qwen3_5.KINDS,
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    head_norms=True,
    norm=rms_norm_unit_offset,
    mixer=delta_or_gated_attention,
    block_tensors=_tensors,
    elsewhere=lambda config: qwen3_5.MTP_HEADS,
)
