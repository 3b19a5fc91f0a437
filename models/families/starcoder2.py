"""Describes StarCoder2: LayerNorms and a plain MLP, all with biases.

StarCoder 2 and The Stack v2: The Next Generation, arXiv 2402.19173.
"""

from decodax.models.families.contract import BLOCK_TENSORS, Family
from decodax.models.families.layer import layer_norm, plain_mlp, sizes, slides_if_windowed

FAMILY = Family(
    model_type="starcoder2",
    defaults={
        **sizes(49152, 3072, 12288, 30, 24),
        "num_key_value_heads": 2,
        "head_dim": None,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "norm_epsilon": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_bias": True,
        "sliding_window": None,
    },
    nullable=frozenset({"sliding_window"}),
    layer_kind=slides_if_windowed,
    qkv_bias="use_bias",
    out_bias="use_bias",
    norm=layer_norm("norm_epsilon"),
    mlp_bias="use_bias",
    feed_forward=plain_mlp,
    block_tensors={
        **BLOCK_TENSORS,
        "feed_forward/up": "mlp.c_fc.weight",
        "feed_forward/down": "mlp.c_proj.weight",
        "feed_forward/up_bias": "mlp.c_fc.bias",
        "feed_forward/down_bias": "mlp.c_proj.bias",
    },
)
