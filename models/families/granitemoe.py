"""Describes Granite 3 with experts: Mixtral with four factors for embeddings, scores, residuals and logits.

Granite 3.0 Language Models, IBM 2024. Power Scheduler, arXiv 2408.13359 (PowerMoE).
"""

from decodax.layers.moe.layer import MoEConfig
from decodax.models.checkpoints.name_map import NameMaps, PeriodicSlice, TensorSlice
from decodax.models.config import BlockConfig
from decodax.models.families._experts import either, softmax_top_k
from decodax.models.families._granite import scaled_block, scaled_embedding, scaled_head, scaled_scores
from decodax.models.families.contract import BLOCK_TENSORS, BlockTensors, Family
from decodax.models.families.layer import Layer, sizes


def _experts(layer: Layer) -> MoEConfig:
    router = softmax_top_k(layer, num_experts="num_local_experts", renormalise=True)
    return MoEConfig(router, layer.fields["intermediate_size"], layer.activation)


def _tensors(block: BlockConfig) -> BlockTensors:
    """The tensor names; experts are always stacked, gate and up in one tensor."""
    config = block.feed_forward_layer
    assert isinstance(config, MoEConfig)
    width = config.intermediate_size

    def half(part: PeriodicSlice) -> NameMaps:
        names = ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj")
        return tuple((TensorSlice(name, part=part, axis=1),) for name in names)

    return {
        **BLOCK_TENSORS,
        "feed_forward/router/weight": either("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
        "feed_forward/experts/gate": half(PeriodicSlice(2 * width, 0, width)),
        "feed_forward/experts/up": half(PeriodicSlice(2 * width, width, 2 * width)),
        "feed_forward/experts/down": either(
            "block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"
        ),
    }


FAMILY = Family(
    model_type="granitemoe",
    defaults={
        **sizes(32000, 4096, 11008, 32, 32),
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    mixer=scaled_scores,
    fixed={"norm_topk_prob": True},
    feed_forward=_experts,
    block=scaled_block,
    embedding=scaled_embedding,
    head=scaled_head,
    block_tensors=_tensors,
)
