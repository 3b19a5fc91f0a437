"""What the families with experts share: which layers have them, and what their tensors are called."""

from collections.abc import Callable

from decodax.layers.feed_forward import FeedForward, GatedMLPConfig
from decodax.layers.moe.layer import MoEConfig
from decodax.layers.moe.routers.top_k import TopK
from decodax.models.config import BlockConfig
from decodax.models.families._contract import BLOCK_TENSORS, BlockTensors
from decodax.models.families._layer import Layer, gated_mlp
from decodax.models.sources import Layouts, gated_experts, whole


def softmax_top_k(
    layer: Layer, *, num_experts: str = "num_experts", renormalise: bool | str = "norm_topk_prob"
) -> TopK:
    """The experts with the largest shares of a softmax over all; the shares of the chosen add up to 1 if renormalised.

    num_experts: the field with their number. renormalise: true, false, or the field that says so.
    """
    fields = layer.fields
    per_token = fields["num_experts_per_tok"]
    return TopK(fields[num_experts], per_token, score="softmax", renormalise=layer.flag(renormalise))


def is_sparse(layer: Layer) -> bool:
    """Qwen's rule: every `decoder_sparse_step`-th layer has experts, but for those in `mlp_only_layers`."""
    dense = layer.fields["mlp_only_layers"] or []
    return layer.index not in dense and (layer.index + 1) % layer.fields["decoder_sparse_step"] == 0


def where(
    is_sparse: Callable[[Layer], bool], experts: Callable[[Layer], FeedForward]
) -> Callable[[Layer], FeedForward]:
    """Experts in the layers for which it is so, and a gated MLP in the others."""
    return lambda layer: experts(layer) if is_sparse(layer) else gated_mlp(layer)


def qwen_experts(layer: Layer) -> MoEConfig:
    """Experts of `moe_intermediate_size` each, chosen by softmax."""
    return MoEConfig(softmax_top_k(layer), layer.fields["moe_intermediate_size"], layer.activation)


def qwen_gated_shared_experts(layer: Layer) -> MoEConfig:
    """The same, beside an MLP for all tokens that a sigmoid of the token scales."""
    fields, activation = layer.fields, layer.activation
    shared = GatedMLPConfig(fields["shared_expert_intermediate_size"], activation)
    router = softmax_top_k(layer)
    return MoEConfig(router, fields["moe_intermediate_size"], activation, shared=shared, shared_gate=True)


def either(*names: str) -> Layouts:
    """One tensor that programs have given several names."""
    return tuple(layout for name in names for layout in whole(name))


def experts_at(config: MoEConfig, gate: str, up: str, down: str) -> BlockTensors:
    """Where the experts are: one matrix each, by names with {} in the expert's place, or stacked by transformers."""
    layouts = gated_experts(
        config.router.num_experts,
        config.intermediate_size,
        gate=gate,
        up=up,
        down=down,
        stacked_gate_up="mlp.experts.gate_up_proj",
        stacked_down="mlp.experts.down_proj",
    )
    return {f"feed_forward/experts/{name}": several for name, several in layouts.items()}


def expert_tensors(block: BlockConfig) -> BlockTensors:
    """The names of most families with experts, which began with Qwen2-MoE; also those of layers without."""
    if not isinstance(block.feed_forward, MoEConfig):
        return BLOCK_TENSORS
    names = (f"mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down"))
    return {
        **BLOCK_TENSORS,
        "feed_forward/router/weight": "mlp.gate.weight",
        "feed_forward/router/selection_bias": "mlp.gate.e_score_correction_bias",
        **experts_at(block.feed_forward, *names),
        **{f"feed_forward/shared/{name}": f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")},
        **{
            f"feed_forward/shared/{name}_bias": f"mlp.shared_experts.{name}_proj.bias"
            for name in ("gate", "up", "down")
        },
    }


def mixtral_tensors(block: BlockConfig) -> BlockTensors:
    """Mixtral's names: w1, w3 and w2 for gate, up and down, in a `block_sparse_moe`."""
    assert isinstance(block.feed_forward, MoEConfig)
    names = (f"block_sparse_moe.experts.{{}}.{name}.weight" for name in ("w1", "w3", "w2"))
    return {
        **BLOCK_TENSORS,
        "feed_forward/router/weight": either("block_sparse_moe.gate.weight", "mlp.gate.weight"),
        **experts_at(block.feed_forward, *names),
    }
