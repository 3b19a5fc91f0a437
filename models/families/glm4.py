"""Describes GLM-4-0414 and GLM-Z1: GLM-4-9B with norms after attention and MLP as well.

ChatGLM: A Family of Large Language Models from GLM-130B to GLM-4 All Tools, arXiv 2406.12793; GLM-4-0414.
"""

from decodax.models.config import BlockConfig
from decodax.models.families import _glm
from decodax.models.families.contract import BlockTensors, Family
from decodax.models.families.layer import pre_and_post_norm


def _tensors(block: BlockConfig) -> BlockTensors:
    return {
        **_glm.tensors(block),
        "mixer_post_norm/weight": "post_self_attn_layernorm.weight",
        "feed_forward_post_norm/weight": "post_mlp_layernorm.weight",
    }


FAMILY = Family(
    model_type="glm4",
    defaults=_glm.DEFAULTS,
    interleaved_rope=True,
    qkv_bias="attention_bias",
    block=pre_and_post_norm,
    block_tensors=_tensors,
)
