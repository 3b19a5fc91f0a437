"""Describes Phi-1, 1.5 and 2: attention and MLP side by side after one norm, half of a head rotates, a biased head.

Textbooks Are All You Need II: phi-1.5 technical report, arXiv 2309.05463.
"""

from decodax.models.families.contract import BLOCK_TENSORS, OUTER_TENSORS, Family
from decodax.models.families.layer import layer_norm, parallel_one_norm, plain_mlp, sizes
from decodax.models.head import HeadConfig

FAMILY = Family(
    model_type="phi",
    defaults={
        **sizes(51200, 2048, 8192, 24, 32),
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "gelu_new",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "qk_layernorm": False,
        "tie_word_embeddings": False,
    },
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    head_norms="qk_layernorm",
    feed_forward=plain_mlp,
    norm=layer_norm("layer_norm_eps"),
    block=parallel_one_norm,
    head=lambda fields: HeadConfig(bias=True),
    outer_tensors={
        **OUTER_TENSORS,
        "final_norm/weight": "model.final_layernorm.weight",
        "final_norm/bias": "model.final_layernorm.bias",
    },
    block_tensors={
        **BLOCK_TENSORS,
        "mixer/out": "self_attn.dense.weight",
        "mixer/out_bias": "self_attn.dense.bias",
        **{f"mixer/query_norm/{kind}": f"self_attn.q_layernorm.{kind}" for kind in ("weight", "bias")},
        **{f"mixer/key_norm/{kind}": f"self_attn.k_layernorm.{kind}" for kind in ("weight", "bias")},
        "feed_forward/up": "mlp.fc1.weight",
        "feed_forward/up_bias": "mlp.fc1.bias",
        "feed_forward/down": "mlp.fc2.weight",
        "feed_forward/down_bias": "mlp.fc2.bias",
    },
)
