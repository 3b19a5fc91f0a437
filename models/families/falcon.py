"""Describes Falcon: attention and MLP side by side with one norm (7B) or two (40B, 180B), or in turn with ALiBi (RW).

The Falcon Series of Open Language Models, arXiv 2311.16867. transformers rounds ALiBi's biases to bfloat16, in any
precision; here they are exact.
"""

from dataclasses import replace

from decodax.layers.alibi import Alibi
from decodax.layers.feed_forward import MLPConfig
from decodax.layers.mixers.gqa import GQAConfig
from decodax.models.config import BlockConfig
from decodax.models.families._fused_heads import fused_head_tensors
from decodax.models.families.contract import BlockTensors, Family
from decodax.models.families.layer import Fields, Layer, attention, layer_norm, parallel, parallel_one_norm, pre_norm


def _attention(layer: Layer) -> GQAConfig:
    fields, made = layer.fields, attention(layer)
    is_single = fields["multi_query"] and not fields["new_decoder_architecture"]
    positions = Alibi(scale=made.scale) if fields["alibi"] else made.positions
    return replace(made, num_kv_heads=1 if is_single else fields["num_kv_heads"], positions=positions)


def _mlp(layer: Layer) -> MLPConfig:
    return MLPConfig(layer.fields["ffn_hidden_size"], layer.activation, layer.flag("bias"))


def _block(layer: Layer) -> BlockConfig:
    fields = layer.fields
    if not fields["parallel_attn"]:
        return pre_norm(layer)
    return parallel(layer) if fields["num_ln_in_parallel_attn"] == 2 else parallel_one_norm(layer)


def _unsupported(fields: Fields) -> list[str]:
    lines, several = [], fields["num_ln_in_parallel_attn"]
    if fields["new_decoder_architecture"] and not fields["parallel_attn"]:
        lines.append("parallel_attn must be true with new_decoder_architecture, got false")
    if fields["new_decoder_architecture"] and several not in (1, 2):
        lines.append(f"num_ln_in_parallel_attn must be 1 or 2, got {several}")
    if several == 2 and not fields["new_decoder_architecture"]:
        lines.append("num_ln_in_parallel_attn must be 1 without new_decoder_architecture, got 2")
    heads = fields["num_attention_heads"]
    if fields["new_decoder_architecture"]:
        if heads % fields["num_kv_heads"]:
            lines.append(f"num_kv_heads must divide num_attention_heads ({heads}), got {fields['num_kv_heads']}")
    elif not fields["multi_query"] and fields["num_kv_heads"] != heads:
        lines.append(
            f"num_kv_heads must be num_attention_heads ({heads}) where new_decoder_architecture and multi_query are "
            f"false, got {fields['num_kv_heads']}"
        )
    return lines


def _tensors(block: BlockConfig) -> BlockTensors:
    """The tensor names; the norms have others where there are two of them side by side."""
    tensors = fused_head_tensors(block, "self_attention")
    if block.order != "parallel":
        return tensors
    norms = {f"mixer_norm/{kind}": f"ln_attn.{kind}" for kind in ("weight", "bias")}
    return {**tensors, **norms, **{f"feed_forward_norm/{kind}": f"ln_mlp.{kind}" for kind in ("weight", "bias")}}


FAMILY = Family(
    model_type="falcon",
    defaults={
        "vocab_size": 65024,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "num_kv_heads": None,
        "ffn_hidden_size": None,
        "activation": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_epsilon": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "alibi": False,
        "bias": False,
        "multi_query": True,
        "new_decoder_architecture": False,
        "num_ln_in_parallel_attn": None,
        "parallel_attn": True,
    },
    nullable=frozenset({"alibi", "bias", "multi_query", "new_decoder_architecture", "parallel_attn"}),
    aliases={"n_embed": "hidden_size"},
    ignored=frozenset({"apply_residual_connection_post_layernorm"}),
    activation_field="activation",
    qkv_bias="bias",
    out_bias="bias",
    mixer=_attention,
    feed_forward=_mlp,
    norm=layer_norm("layer_norm_epsilon"),
    block=_block,
    derived={
        "num_kv_heads": lambda fields: fields["num_attention_heads"],
        "ffn_hidden_size": lambda fields: 4 * fields["hidden_size"],
        "num_ln_in_parallel_attn": lambda fields: 2 if fields["new_decoder_architecture"] else 1,
    },
    unsupported=_unsupported,
    outer_tensors={
        "embedding": "transformer.word_embeddings.weight",
        "final_norm/weight": "transformer.ln_f.weight",
        "final_norm/bias": "transformer.ln_f.bias",
        "head": "lm_head.weight",
    },
    layer_prefix="transformer.h.{}.",
    body_prefix="transformer.",
    block_tensors=_tensors,
)
