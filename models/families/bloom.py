"""Describes BLOOM: ALiBi, a norm of the embeddings, LayerNorms and plain MLPs with biases.

BLOOM: A 176B-Parameter Open-Access Multilingual Language Model, arXiv 2211.05100.
"""

from dataclasses import replace

from decodax.layers.alibi import Alibi
from decodax.layers.feed_forward import MLPConfig
from decodax.layers.mixers.gqa import GQAConfig
from decodax.models.config import BlockConfig, Residual
from decodax.models.embedding import EmbeddingConfig
from decodax.models.families._fused_heads import fused_head_tensors
from decodax.models.families.contract import Family
from decodax.models.families.layer import Fields, Layer, attention, layer_norm, pre_norm, with_residuals

_norm = layer_norm("layer_norm_epsilon")


def _attention(layer: Layer) -> GQAConfig:
    return replace(attention(layer), positions=Alibi())


def _mlp(layer: Layer) -> MLPConfig:
    return MLPConfig(4 * layer.fields["hidden_size"], "gelu_tanh", bias=True)


def _block(layer: Layer) -> BlockConfig:
    kept = Residual(after_norm=layer.fields["apply_residual_connection_post_layernorm"])
    return with_residuals(pre_norm(layer), kept, kept)


def _embedding(fields: Fields) -> EmbeddingConfig:
    return EmbeddingConfig(norm=_norm(fields))


FAMILY = Family(
    model_type="bloom",
    defaults={
        "vocab_size": 250880,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "layer_norm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,  # that of the training, which most files call seq_length; ALiBi has no limit
    },
    aliases={
        "n_embed": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "seq_length": "max_position_embeddings",
    },
    # How the same sums are computed, and what older files say of the training.
    ignored=frozenset({"slow_but_exact", "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion"})
    | {"offset_alibi", "skip_bias_add", "skip_bias_add_qkv", "unk_token_id", "n_inner"},
    qkv_bias=True,
    out_bias=True,
    mixer=_attention,
    feed_forward=_mlp,
    norm=_norm,
    block=_block,
    embedding=_embedding,
    outer_tensors={
        "embedding": "transformer.word_embeddings.weight",
        "embedding_norm/weight": "transformer.word_embeddings_layernorm.weight",
        "embedding_norm/bias": "transformer.word_embeddings_layernorm.bias",
        "final_norm/weight": "transformer.ln_f.weight",
        "final_norm/bias": "transformer.ln_f.bias",
        "head": "lm_head.weight",
    },
    layer_prefix="transformer.h.{}.",
    body_prefix="transformer.",
    block_tensors=lambda block: fused_head_tensors(block, "self_attention"),
)
