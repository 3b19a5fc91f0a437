"""Describes MiniMax-Text-01: lightning attention in seven layers of eight, softmax in the eighth, experts in all.

MiniMax-01: Scaling Foundation Models with Lightning Attention, arXiv 2501.08313. Mixer and feed-forward add to the
normed residual stream, each term with a factor of its own.
"""

from dataclasses import replace

from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.mixers.lightning import LightningConfig, minimax_slopes
from decodax.layers.moe.layer import MoEConfig
from decodax.layers.norm import RMSNormConfig
from decodax.models.config import BlockConfig, Residual
from decodax.models.families._experts import mixtral_tensors, softmax_top_k
from decodax.models.families.contract import BlockTensors, Family
from decodax.models.families.layer import Fields, Layer, attention, pre_norm, sizes, with_residuals

LIGHTNING_NORM = RMSNormConfig(1e-6)  # transformers' own, whatever rms_norm_eps says
FACTORS = ("full_attn_alpha_factor", "full_attn_beta_factor", "linear_attn_alpha_factor")
FACTORS += ("linear_attn_beta_factor", "mlp_alpha_factor", "mlp_beta_factor")


def _layer_kind(fields: Fields, index: int) -> str:
    """Without `layer_types`, softmax attention and lightning attention alternate."""
    return "linear_attention" if index % 2 else "full_attention"


def _mixer(layer: Layer) -> GQAConfig | LightningConfig:
    fields = layer.fields
    if layer.kind != "linear_attention":
        kind = "full_attention" if fields["sliding_window"] is None else "sliding_attention"
        return attention(replace(layer, kind=kind))
    slopes = minimax_slopes(fields["num_attention_heads"], layer.index, fields["num_hidden_layers"])
    return LightningConfig(
        num_heads=fields["num_attention_heads"],
        head_size=fields["head_dim"],
        slopes=slopes,
        activation=layer.activation,
        scale=1.0,
        norm=LIGHTNING_NORM,
    )


def _experts(layer: Layer) -> MoEConfig:
    router = softmax_top_k(layer, num_experts="num_local_experts", renormalise=True)
    return MoEConfig(router, layer.fields["intermediate_size"], layer.activation)


def _block(layer: Layer) -> BlockConfig:
    mixer = "linear_attn" if layer.kind == "linear_attention" else "full_attn"

    def factors(name: str) -> Residual:
        keep, add = (float(layer.fields[f"{name}_{factor}_factor"]) for factor in ("alpha", "beta"))
        return Residual(keep, add, after_norm=True)

    return with_residuals(pre_norm(layer), factors(mixer), factors("mlp"))


def _tensors(block: BlockConfig) -> BlockTensors:
    tensors = mixtral_tensors(block)
    if not isinstance(block.mixer.layer, LightningConfig):
        return tensors
    return {
        **tensors,
        "mixer/query_key_value": "self_attn.qkv_proj.weight",
        "mixer/gate": "self_attn.output_gate.weight",
        "mixer/norm/weight": "self_attn.norm.weight",
        "mixer/out": "self_attn.out_proj.weight",
    }


FAMILY = Family(
    model_type="minimax",
    defaults={
        **sizes(32000, 4096, 14336, 32, 32),
        "num_key_value_heads": 8,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "layer_types": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        **dict.fromkeys(FACTORS, 1),
    },
    nullable=frozenset({"sliding_window", "layer_types"}),
    aliases={"num_experts": "num_local_experts"},
    ignored=frozenset({"block_size"}),  # of transformers' lightning attention
    layer_kind=_layer_kind,
    kinds=frozenset({"full_attention", "linear_attention"}),
    mixer=_mixer,
    fixed={"norm_topk_prob": True},
    feed_forward=_experts,
    block=_block,
    block_tensors=_tensors,
)
