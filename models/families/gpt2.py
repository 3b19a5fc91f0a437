"""Describes GPT-2: learned positions, LayerNorms, a plain MLP, matrices stored as [inputs, outputs].

Language Models are Unsupervised Multitask Learners, OpenAI 2019.
"""

from dataclasses import replace

from decodax.layers.feed_forward import MLPConfig
from decodax.layers.mixers.gqa import GQAConfig
from decodax.models.checkpoints.name_map import NameMaps, TensorSlice, fused_rows
from decodax.models.config import BlockConfig
from decodax.models.embedding import EmbeddingConfig, LearnedPositions
from decodax.models.families.contract import BlockTensors, Family
from decodax.models.families.layer import Fields, Layer, attention, layer_norm


def _attention(layer: Layer) -> GQAConfig:
    fields, made = layer.fields, attention(layer)
    scale = made.scale if fields["scale_attn_weights"] else 1.0
    return replace(made, scale=scale / (layer.index + 1 if fields["scale_attn_by_inverse_layer_idx"] else 1))


def _mlp(layer: Layer) -> MLPConfig:
    return MLPConfig(layer.fields["n_inner"], layer.activation, bias=True)


def _embedding(fields: Fields) -> EmbeddingConfig:
    return EmbeddingConfig(positions=LearnedPositions(fields["max_position_embeddings"]))


def _transposed(name: str) -> NameMaps:
    return ((TensorSlice(name, transposed=True),),)


def _tensors(block: BlockConfig) -> BlockTensors:
    mixer = block.mixer.layer
    assert isinstance(mixer, GQAConfig)
    wide = mixer.num_heads * mixer.head_size
    matrices: dict[str, int] = dict.fromkeys(("mixer/query", "mixer/key", "mixer/value"), wide)
    biases = {f"{name}_bias": size for name, size in matrices.items()}
    return {
        "mixer_norm/weight": "ln_1.weight",
        "mixer_norm/bias": "ln_1.bias",
        **fused_rows("attn.c_attn.weight", matrices, axis=1, transposed=True),
        **fused_rows("attn.c_attn.bias", biases),
        "mixer/out": _transposed("attn.c_proj.weight"),
        "mixer/out_bias": "attn.c_proj.bias",
        "feed_forward_norm/weight": "ln_2.weight",
        "feed_forward_norm/bias": "ln_2.bias",
        "feed_forward/up": _transposed("mlp.c_fc.weight"),
        "feed_forward/up_bias": "mlp.c_fc.bias",
        "feed_forward/down": _transposed("mlp.c_proj.weight"),
        "feed_forward/down_bias": "mlp.c_proj.bias",
    }


FAMILY = Family(
    model_type="gpt2",
    defaults={
        "vocab_size": 50257,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "max_position_embeddings": 1024,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    },
    aliases={
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
    },
    derived={"n_inner": lambda fields: 4 * fields["hidden_size"]},
    # n_ctx is n_positions; the others are of other tasks, or of the order of the same computation.
    ignored=frozenset(
        {
            "n_ctx",
            "reorder_and_upcast_attn",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
        }
    ),
    activation_field="activation_function",
    qkv_bias=True,
    out_bias=True,
    mixer=_attention,
    feed_forward=_mlp,
    norm=layer_norm("layer_norm_epsilon"),
    embedding=_embedding,
    outer_tensors={
        "embedding": "transformer.wte.weight",
        "position_embedding": "transformer.wpe.weight",
        "final_norm/weight": "transformer.ln_f.weight",
        "final_norm/bias": "transformer.ln_f.bias",
        "head": "lm_head.weight",
    },
    layer_prefix="transformer.h.{}.",
    body_prefix="transformer.",
    block_tensors=_tensors,
    elsewhere=lambda config: r".*\.attn\.(masked_)?bias",  # causal masks
)
