"""Describes OPT: learned positions, LayerNorms before or after the sums, plain MLPs, projected embeddings (350M).

OPT: Open Pre-trained Transformer Language Models, arXiv 2205.01068.
"""

from decodax.layers.feed_forward import MLPConfig
from decodax.layers.norm import LayerNormConfig
from decodax.models.config import BlockConfig, SubLayer
from decodax.models.embedding import EmbeddingConfig, LearnedPositions
from decodax.models.families.contract import BlockTensors, Family
from decodax.models.families.layer import Fields, Layer, attention, pre_norm
from decodax.models.head import HeadConfig


def _mlp(layer: Layer) -> MLPConfig:
    return MLPConfig(layer.fields["ffn_dim"], layer.activation, layer.fields["enable_bias"])


def _norm(fields: Fields) -> LayerNormConfig:
    has = fields["layer_norm_elementwise_affine"]
    return LayerNormConfig(1e-5, has_weight=has, has_bias=has)  # PyTorch's epsilon, which no field changes


def _final_norm(fields: Fields) -> LayerNormConfig | None:
    return _norm(fields) if fields["do_layer_norm_before"] and not fields["_remove_final_layer_norm"] else None


def _block(layer: Layer) -> BlockConfig:
    if layer.fields["do_layer_norm_before"]:
        return pre_norm(layer)
    return BlockConfig(
        SubLayer(attention(layer), None, sum_norm=layer.norm), SubLayer(_mlp(layer), None, sum_norm=layer.norm)
    )


def _inner_size(fields: Fields) -> int | None:
    size = fields["word_embed_proj_dim"]
    return None if size == fields["hidden_size"] else size


def _embedding(fields: Fields) -> EmbeddingConfig:
    positions = LearnedPositions(fields["max_position_embeddings"] + 2, offset=2)
    return EmbeddingConfig(size=_inner_size(fields), positions=positions)


def _tensors(block: BlockConfig) -> BlockTensors:
    norm = "norm" if block.mixer.norm is not None else "sum_norm"
    return {
        **{f"mixer_{norm}/{kind}": f"self_attn_layer_norm.{kind}" for kind in ("weight", "bias")},
        **{f"feed_forward_{norm}/{kind}": f"final_layer_norm.{kind}" for kind in ("weight", "bias")},
        **{f"mixer/{name}": f"self_attn.{name[0]}_proj.weight" for name in ("query", "key", "value")},
        **{f"mixer/{name}_bias": f"self_attn.{name[0]}_proj.bias" for name in ("query", "key", "value")},
        "mixer/out": "self_attn.out_proj.weight",
        "mixer/out_bias": "self_attn.out_proj.bias",
        "feed_forward/up": "fc1.weight",
        "feed_forward/up_bias": "fc1.bias",
        "feed_forward/down": "fc2.weight",
        "feed_forward/down_bias": "fc2.bias",
    }


FAMILY = Family(
    model_type="opt",
    defaults={
        "vocab_size": 50272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "ffn_dim": 3072,
        "activation_function": "relu",
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
        "enable_bias": True,
        "word_embed_proj_dim": None,
        "tie_word_embeddings": True,
    },
    derived={"word_embed_proj_dim": lambda fields: fields["hidden_size"]},
    ignored=frozenset({"dropout", "activation_dropout", "layerdrop", "init_std"}),  # of training
    activation_field="activation_function",
    qkv_bias="enable_bias",
    out_bias="enable_bias",
    feed_forward=_mlp,
    norm=_norm,
    final_norm=_final_norm,
    block=_block,
    embedding=_embedding,
    head=lambda fields: HeadConfig(size=_inner_size(fields)),
    outer_tensors={
        "embedding": "model.decoder.embed_tokens.weight",
        "embedding_projection": "model.decoder.project_in.weight",
        "position_embedding": "model.decoder.embed_positions.weight",
        "final_norm/weight": "model.decoder.final_layer_norm.weight",
        "final_norm/bias": "model.decoder.final_layer_norm.bias",
        "head": "lm_head.weight",
        "head_projection": "model.decoder.project_out.weight",
    },
    layer_prefix="model.decoder.layers.{}.",
    block_tensors=_tensors,
)
