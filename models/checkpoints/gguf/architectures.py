"""Describes the architectures of GGUF files that decodax reads: their tensors and key-values, in Hugging Face's names.

Facts from llama.cpp's converters (conversion/*.py) and from the package `gguf` (constants.py, tensor_mapping.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from decodax.models.checkpoints.gguf.reordered import Alternating, KeysAndValues


def _weights_and_biases(names: Mapping[str, str]) -> dict[str, str]:
    """The names with the suffixes of weights and of biases."""
    return {f"{ours}.{end}": f"{theirs}.{end}" for ours, theirs in names.items() for end in ("weight", "bias")}


_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_DENSE = _weights_and_biases(_ATTENTION | _MLP)

_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_QWEN_EXPERT_FIELDS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp's.

    model_type: the family in decodax, `model_type` in a config.json.
    class_name: of the family's class in transformers.
    tensors: GGUF's name in a layer -> Hugging Face's; one with {} is a stack, of which each tensor has a name.
    fields: key without the architecture's name -> the field of a config.json that it is.
    constants: fields of the family that GGUF does not store, because llama.cpp has them in its code.
    bias_fields: field -> the tensor of the first layer whose presence it says.
    paired_heads: the tensors that have the two halves of each rotated pair side by side.
    unit_offset: norms are stored as 1 + weight.
    combined: Hugging Face's name in a layer -> how two tensors make it, and these two.
    one_row: the tensors whose only row is a vector in GGUF.
    in_code: keys that must have these values where a file has them: llama.cpp's code does not ask for them.
    variant: (keys) -> what it is in files with these; None: itself.
    is_latent: attention is latent (MLA).
    yarn_truncates: whether the bounds of YaRN's ramp are rounded to whole pairs.
    """

    model_type: str
    class_name: str
    tensors: Mapping[str, str] = field(default_factory=lambda: _DENSE)
    fields: Mapping[str, str] = field(default_factory=lambda: _FIELDS)
    constants: Mapping[str, Any] = field(default_factory=dict)
    bias_fields: Mapping[str, str] = field(default_factory=dict)
    paired_heads: frozenset[str] = frozenset()
    unit_offset: bool = False
    combined: Mapping[str, tuple[type[Alternating] | type[KeysAndValues], str, str]] = field(default_factory=dict)
    one_row: frozenset[str] = frozenset()
    in_code: Mapping[str, Any] = field(default_factory=dict)
    variant: Callable[[Mapping[str, Any]], "Architecture | None"] = lambda keys: None
    is_latent: bool = False
    yarn_truncates: bool = True


_PAIRED = frozenset(f"{name}.{end}" for name in ("attn_q", "attn_k") for end in ("weight", "bias"))

MIXTRAL = Architecture(
    "mixtral",
    "MixtralForCausalLM",
    tensors=_weights_and_biases(
        _ATTENTION
        | {
            "ffn_gate_inp": "block_sparse_moe.gate",
            "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
            "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
            "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
        }
    ),
    fields=_FIELDS | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    constants={"sliding_window": None},
    paired_heads=_PAIRED,
    in_code={"expert_weights_norm": True},
)

# With or without a query latent. V3's attention in files of today is two tensors, of which one is transposed.
DEEPSEEK_V2 = Architecture(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    tensors=_weights_and_biases(
        _ATTENTION
        | _MLP
        | _EXPERTS
        | {
            "attn_q_a": "self_attn.q_a_proj",
            "attn_q_a_norm": "self_attn.q_a_layernorm",
            "attn_q_b": "self_attn.q_b_proj",
            "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
            "attn_kv_a_norm": "self_attn.kv_a_layernorm",
            "attn_kv_b": "self_attn.kv_b_proj",
            "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
            "ffn_up_shexp": "mlp.shared_experts.up_proj",
            "ffn_down_shexp": "mlp.shared_experts.down_proj",
        }
    )
    | {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"},
    fields={name: field_name for name, field_name in _FIELDS.items() if name != "attention.head_count_kv"}
    | {
        "attention.q_lora_rank": "q_lora_rank",
        "attention.kv_lora_rank": "kv_lora_rank",
        "leading_dense_block_count": "first_k_dense_replace",
        "expert_count": "n_routed_experts",
        "expert_shared_count": "n_shared_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_weights_scale": "routed_scaling_factor",
        "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group",
    },
    constants={
        "q_lora_rank": None,
        "first_k_dense_replace": 0,
        "n_shared_experts": 0,
        "routed_scaling_factor": 1.0,
        "n_group": None,
        "topk_group": None,
    },
    combined={"self_attn.kv_b_proj.weight": (KeysAndValues, "attn_k_b.weight", "attn_v_b.weight")},
    in_code={"expert_weights_norm": False},
    is_latent=True,
)
DEEPSEEK_V3 = replace(
    DEEPSEEK_V2,
    model_type="deepseek_v3",
    class_name="DeepseekV3ForCausalLM",
    fields={**DEEPSEEK_V2.fields, "expert_weights_norm": "norm_topk_prob"},
    constants={**DEEPSEEK_V2.constants, "norm_topk_prob": False},
    in_code={"expert_gating_func": 2},
)

# By `general.architecture`. Mistral's files say llama, and no window: llama.cpp does not write it.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "llama",
        "LlamaForCausalLM",
        bias_fields={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_gate.bias"},
        paired_heads=_PAIRED,
        variant=lambda keys: MIXTRAL if keys.get("expert_count") else None,
    ),
    "deepseek2": replace(
        DEEPSEEK_V2, variant=lambda keys: DEEPSEEK_V3 if keys.get("expert_gating_func") == 2 else None
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", constants={"use_sliding_window": False}),
    "qwen2moe": Architecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        tensors=_weights_and_biases(
            _ATTENTION
            | _EXPERTS
            | {
                "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
                "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
                "ffn_up_shexp": "mlp.shared_expert.up_proj",
                "ffn_down_shexp": "mlp.shared_expert.down_proj",
            }
        ),
        fields=_FIELDS | _QWEN_EXPERT_FIELDS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        constants={"use_sliding_window": False, "norm_topk_prob": False},
        in_code={"expert_weights_norm": False},
        bias_fields={"qkv_bias": "attn_q.bias"},
        one_row=frozenset({"ffn_gate_inp_shexp.weight"}),
    ),
    "qwen3": Architecture(
        "qwen3",
        "Qwen3ForCausalLM",
        constants={"use_sliding_window": False},
        bias_fields={"attention_bias": "attn_q.bias"},
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        tensors=_weights_and_biases(_ATTENTION | _EXPERTS),
        fields=_FIELDS | _QWEN_EXPERT_FIELDS,
        constants={"use_sliding_window": False, "norm_topk_prob": True},
        in_code={"expert_weights_norm": True},
        bias_fields={"attention_bias": "attn_q.bias"},
    ),
    "olmoe": Architecture(
        "olmoe",
        "OlmoeForCausalLM",
        tensors=_weights_and_biases(_ATTENTION | _EXPERTS),
        fields=_FIELDS
        | {
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "attention.clamp_kqv": "clip_qkv",
        },
        constants={"norm_topk_prob": False},
        in_code={"expert_weights_norm": False},
    ),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        tensors=_weights_and_biases(
            _ATTENTION
            | _MLP
            | {
                "post_attention_norm": "post_attention_layernorm",
                "ffn_norm": "pre_feedforward_layernorm",
                "post_ffw_norm": "post_feedforward_layernorm",
            }
        ),
        fields=_FIELDS
        | {
            "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        constants={"hidden_activation": "gelu_pytorch_tanh"},
        unit_offset=True,
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        "GptOssForCausalLM",
        tensors={
            **_weights_and_biases(_ATTENTION),
            "post_attention_norm.weight": "post_attention_layernorm.weight",
            "attn_sinks.weight": "self_attn.sinks",
            "ffn_gate_inp.weight": "mlp.router.weight",
            "ffn_gate_inp.bias": "mlp.router.bias",
            "ffn_down_exps.weight": "mlp.experts.down_proj_blocks",
            "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
        },
        fields={name: field_name for name, field_name in _FIELDS.items() if name != "feed_forward_length"}
        | {
            "expert_feed_forward_length": "intermediate_size",
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "attention.sliding_window": "sliding_window",
        },
        combined={
            "mlp.experts.gate_up_proj_blocks": (Alternating, "ffn_gate_exps.weight", "ffn_up_exps.weight"),
            "mlp.experts.gate_up_proj_bias": (Alternating, "ffn_gate_exps.bias", "ffn_up_exps.bias"),
        },
        yarn_truncates=False,
    ),
}
