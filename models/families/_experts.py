"""Builds what the families with experts share: their MoE layers, and the tensor names of experts."""

from collections.abc import Callable

from decodax.layers.feed_forward import FeedForward, GatedMLPConfig
from decodax.layers.moe.layer import MoEConfig
from decodax.layers.moe.routers.top_k import TopK
from decodax.models.checkpoints.name_map import NameMaps, gated_experts, single_tensor
from decodax.models.config import BlockConfig
from decodax.models.families.contract import BLOCK_TENSORS, BlockTensors
from decodax.models.families.layer import Layer, gated_mlp


def softmax_top_k(
    layer: Layer, *, num_experts: str = "num_experts", renormalise: bool | str = "norm_topk_prob"
) -> TopK:
    """A softmax top-k router: the k most probable experts; their probabilities are scaled to sum to 1 if renormalised.

    num_experts: the field with their number.
    renormalise: true, false, or the name of the boolean field.
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
    """Experts in the layers that `is_sparse` selects, and a gated MLP in the others."""
    return lambda layer: experts(layer) if is_sparse(layer) else gated_mlp(layer)


def qwen_experts(layer: Layer) -> MoEConfig:
    """Experts of `moe_intermediate_size` each, chosen by softmax."""
    return MoEConfig(softmax_top_k(layer), layer.fields["moe_intermediate_size"], layer.activation)


def qwen_gated_shared_experts(layer: Layer) -> MoEConfig:
    """`qwen_experts` plus a shared expert for all tokens, scaled by a sigmoid gate of the token."""
    fields, activation = layer.fields, layer.activation
    shared = GatedMLPConfig(fields["shared_expert_intermediate_size"], activation)
    router = softmax_top_k(layer)
    return MoEConfig(router, fields["moe_intermediate_size"], activation, shared=shared, shared_gate=True)


def either(*names: str) -> NameMaps:
    """The name maps of one tensor that programs give several names."""
    return tuple(name_map for name in names for name_map in single_tensor(name))


def experts_at(config: MoEConfig, gate: str, up: str, down: str) -> BlockTensors:
    """The experts' name maps: one matrix each, or stacked as transformers has them.

    config: of the experts.
    gate, up, down: names with {} for the expert.
    """
    name_maps = gated_experts(
        config.router.num_experts,
        config.intermediate_size,
        gate=gate,
        up=up,
        down=down,
        stacked_gate_up="mlp.experts.gate_up_proj",
        stacked_down="mlp.experts.down_proj",
    )
    return {f"feed_forward/experts/{name}": several for name, several in name_maps.items()}


def expert_tensors(block: BlockConfig) -> BlockTensors:
    """The tensor names of most families with experts, from Qwen2-MoE on; also those of layers without experts."""
    if not isinstance(block.feed_forward_layer, MoEConfig):
        return BLOCK_TENSORS
    names = (f"mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down"))
    return {
        **BLOCK_TENSORS,
        "feed_forward/router/weight": "mlp.gate.weight",
        "feed_forward/router/selection_bias": "mlp.gate.e_score_correction_bias",
        **experts_at(block.feed_forward_layer, *names),
        **{f"feed_forward/shared/{name}": f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")},
        **{
            f"feed_forward/shared/{name}_bias": f"mlp.shared_experts.{name}_proj.bias"
            for name in ("gate", "up", "down")
        },
    }


def mixtral_tensors(block: BlockConfig) -> BlockTensors:
    """Mixtral's tensor names: w1, w3 and w2 for gate, up and down, in a `block_sparse_moe`."""
    assert isinstance(block.feed_forward_layer, MoEConfig)
    names = (f"block_sparse_moe.experts.{{}}.{name}.weight" for name in ("w1", "w3", "w2"))
    return {
        **BLOCK_TENSORS,
        "feed_forward/router/weight": either("block_sparse_moe.gate.weight", "mlp.gate.weight"),
        **experts_at(block.feed_forward_layer, *names),
    }
