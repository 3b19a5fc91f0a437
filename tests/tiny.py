"""Makes a tiny model for tests: two layers, all sizes different, with options that change attention."""

import jax

from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.head_norms import HeadNorms
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.norm import RMSNormConfig
from decodax.layers.rope import Rope
from decodax.models.config import ModelConfig, pre_norm_block
from decodax.models.head import HeadConfig
from decodax.models.model import Model

NORM = RMSNormConfig(1e-5)
# A config.json of one layer, for what starts from files.
TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 22,
    "intermediate_size": 29,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 512,
}


def tiny_config(*, vocab_size: int = 37, max_position_embeddings: int = 512) -> ModelConfig:
    """A windowed layer with soft-capped scores, then a full one with head norms and biases."""
    windowed = GQAConfig(6, 2, 8, Rope(8, 1e4), scale=8**-0.5, window=5, softcap=2.0)
    full = GQAConfig(6, 3, 8, Rope(4, 1e4), scale=0.4, qkv_bias=True, out_bias=True, head_norms=HeadNorms(NORM, NORM))
    blocks = (
        pre_norm_block(windowed, GatedMLPConfig(29), NORM, post_norm=NORM),
        pre_norm_block(full, GatedMLPConfig(31, activation="gelu_tanh", bias=True), NORM),
    )
    return ModelConfig(
        vocab_size, 23, max_position_embeddings, blocks, NORM, tie_embeddings=False, head=HeadConfig(softcap=5.0)
    )


def tiny_model(**sizes: int) -> tuple[Model, dict]:
    """The model and its parameters, all random (norms and biases too), large enough that logits differ clearly."""
    model = Model(tiny_config(**sizes))
    params = model.init(jax.random.key(0))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return model, jax.tree.unflatten(structure, noisy)
