"""Describes Qwen1.5-MoE and Qwen2-MoE: 60 small experts, and a shared expert scaled by a gate.

Qwen2 Technical Report, arXiv 2407.10671.
"""

from decodax.models.config import BlockConfig
from decodax.models.families._experts import expert_tensors, is_sparse, qwen_gated_shared_experts, where
from decodax.models.families.contract import BlockTensors, Family
from decodax.models.families.layer import Fields, sizes


def _layer_kind(fields: Fields, index: int) -> str:
    """With a window, every second layer before `max_window_layers`, from the first on, has sliding-window attention."""
    slides = fields["sliding_window"] is not None and index % 2 == 0 and index < fields["max_window_layers"]
    return "sliding_attention" if slides else "full_attention"


def shared_expert_tensors(block: BlockConfig) -> BlockTensors:
    """The tensor names with Qwen's for the shared expert and its gate."""
    names = {f"feed_forward/shared/{name}": f"mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")}
    return {**expert_tensors(block), **names, "feed_forward/shared_gate": "mlp.shared_expert_gate.weight"}


FAMILY = Family(
    model_type="qwen2_moe",
    defaults={
        **sizes(151936, 2048, 5632, 24, 16),
        "num_key_value_heads": 16,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "qkv_bias": True,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    },
    nullable=frozenset({"sliding_window", "layer_types", "mlp_only_layers"}),
    layer_kind=_layer_kind,
    ignored=frozenset({"attention_bias"}),  # the class reads qkv_bias
    qkv_bias="qkv_bias",
    feed_forward=where(is_sparse, qwen_gated_shared_experts),
    block_tensors=shared_expert_tensors,
)
