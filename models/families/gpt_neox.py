"""Describes GPT-NeoX and Pythia: attention and MLP side by side with two norms, or in turn; some of a head rotates.

GPT-NeoX-20B: An Open-Source Autoregressive Language Model, arXiv 2204.06745; Pythia, arXiv 2304.01373.
"""

from decodax.models.config import BlockConfig
from decodax.models.families._fused_heads import fused_head_tensors
from decodax.models.families.contract import Family
from decodax.models.families.layer import Layer, layer_norm, parallel, plain_mlp, pre_norm, sizes


def _block(layer: Layer) -> BlockConfig:
    return parallel(layer) if layer.fields["use_parallel_residual"] else pre_norm(layer)


FAMILY = Family(
    model_type="gpt_neox",
    defaults={
        **sizes(50432, 6144, 24576, 44, 64),
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    aliases={"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
    ignored=frozenset({"classifier_dropout"}),
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    mlp_bias=True,
    feed_forward=plain_mlp,
    norm=layer_norm("layer_norm_eps"),
    block=_block,
    outer_tensors={
        "embedding": "gpt_neox.embed_in.weight",
        "final_norm/weight": "gpt_neox.final_layer_norm.weight",
        "final_norm/bias": "gpt_neox.final_layer_norm.bias",
        "head": ("embed_out.weight", "lm_head.weight"),
    },
    layer_prefix="gpt_neox.layers.{}.",
    body_prefix="gpt_neox.",
    block_tensors=lambda block: fused_head_tensors(block, "attention"),
    elsewhere=lambda config: r".*\.attention\.(masked_)?bias",  # causal masks
)
