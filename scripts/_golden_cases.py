"""Defines the tiny models of tests/golden/ by their `config.json`: one case for each difference between families."""

from typing import Any

# All sizes differ, so that a swapped axis cannot pass by luck; 6 query heads share 2 key-value heads.
SIZES = {
    "vocab_size": 67,
    "hidden_size": 30,
    "intermediate_size": 41,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.02,
}
LLAMA = {**SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "head_dim": 8}
LLAMA_4 = {**LLAMA, "torch_dtype": "float32", "transformers_version": "4.46.0", "use_cache": True, "pretraining_tp": 1}
MISTRAL = {**SIZES, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_act": "silu"}
QWEN2 = {**SIZES, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "head_dim": 8}
QWEN3 = {**SIZES, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu", "head_dim": 8}
GEMMA2 = {
    **SIZES,
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "num_hidden_layers": 3,
    "head_dim": 8,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 7,
    "query_pre_attn_scalar": 13,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 5.0,
}
SHORT, LONG = [1.0, 1.1, 1.3, 1.7], [1.5, 2.5, 4.5, 9.5]

PHI3 = {**SIZES, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_act": "silu"}
GRANITE = {**SIZES, "model_type": "granite", "architectures": ["GraniteForCausalLM"], "hidden_act": "silu"}

CASES: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA_4, "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False},
    "llama_tied": {  # no grouping, and a head size that follows from the others
        **LLAMA_4,
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
        "num_attention_heads": 5,
        "num_key_value_heads": None,
        "head_dim": None,
    },
    "llama_biases": {**LLAMA, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    # The original lengths of these two say that the context is the product already; transformers does not read them.
    "llama_linear": {
        **LLAMA_4,
        "rope_theta": 100.0,
        "rope_scaling": {"type": "linear", "factor": 3.0, "original_max_position_embeddings": 21},
    },
    "llama_dynamic": {
        **LLAMA_4,
        "max_position_embeddings": 17,
        "rope_theta": 100.0,
        "rope_scaling": {"type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 5},
    },
    "llama_llama3": {
        **LLAMA_4,
        "rope_theta": 100.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 37,
        },
    },
    "llama_yarn": {
        **LLAMA,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "original_max_position_embeddings": 16,
        },
    },
    "llama_yarn_mscale": {
        **LLAMA_4,
        "rope_theta": 100.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "beta_fast": 4.0,
            "mscale": 0.7,
            "mscale_all_dim": 1.9,
            "original_max_position_embeddings": 16,
            "truncate": False,
        },
    },
    "llama_longrope": {
        **LLAMA,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "short_factor": SHORT,
            "long_factor": LONG,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {**MISTRAL, "rope_theta": 100.0, "sliding_window": 7, "head_dim": 8},
    "mistral_no_window": {
        **MISTRAL,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "sliding_window": None,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
    },
    "qwen2": {**QWEN2, "rope_theta": 1000.0, "use_sliding_window": False, "sliding_window": 7, "max_window_layers": 1},
    "qwen2_window": {
        **QWEN2,
        "rope_theta": 1000.0,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {**QWEN3, "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}, "tie_word_embeddings": True},
    "qwen3_window": {
        **QWEN3,
        "rope_theta": 1000.0,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma2": {**GEMMA2, "rope_theta": 100.0},
    "gemma2_no_caps": {
        **GEMMA2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "phi3": {**PHI3, "hidden_size": 48, "rope_theta": 100.0, "sliding_window": 7},
    # As Phi-4-mini: three quarters of each head rotate, embeddings are tied. All prompts are longer than the original
    # length: where a row first exceeds it, transformers computes its cache anew with the long factors.
    "phi3_longrope": {
        **PHI3,
        "hidden_size": 48,
        "rope_theta": 100.0,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT[:3], "long_factor": LONG[:3]},
        "original_max_position_embeddings": 4,
        "partial_rotary_factor": 0.75,
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
    "olmo2": {
        **SIZES,
        "model_type": "olmo2",
        "architectures": ["Olmo2ForCausalLM"],
        "hidden_size": 48,
        "hidden_act": "silu",
        "rope_theta": 100.0,
    },
    "granite": {
        **GRANITE,
        "hidden_size": 48,
        "rope_theta": 100.0,
        "attention_bias": True,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.7,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.3,
    },
    "seed_oss": {
        **SIZES,
        "model_type": "seed_oss",
        "architectures": ["SeedOssForCausalLM"],
        "hidden_act": "silu",
        "head_dim": 8,
        "rope_theta": 100.0,
        "attention_bias": True,
        "attention_out_bias": True,
    },
    "starcoder2": {
        **{name: value for name, value in SIZES.items() if name != "rms_norm_eps"},
        "model_type": "starcoder2",
        "architectures": ["Starcoder2ForCausalLM"],
        "hidden_size": 48,
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "rope_theta": 100.0,
        "sliding_window": 7,
        "use_bias": True,
        "tie_word_embeddings": True,
    },
}

PLAIN = {name: value for name, value in SIZES.items() if name not in ("rms_norm_eps", "num_key_value_heads")}
GEMMA = {**SIZES, "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "head_dim": 8, "hidden_act": "gelu"}
GEMMA3 = {
    **SIZES,
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 3,
    "head_dim": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 7,
    "query_pre_attn_scalar": 13,
}
GPT2 = {
    **{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 67, "n_embd": 48, "n_layer": 2},
    **{"n_head": 6, "n_positions": 64, "n_ctx": 64, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
    **{"bos_token_id": 1, "eos_token_id": None, "pad_token_id": None},
}
OPT = {
    **{"model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": 67, "hidden_size": 48, "ffn_dim": 41},
    **{"num_hidden_layers": 2, "num_attention_heads": 6, "max_position_embeddings": 64, "activation_function": "relu"},
    **{"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 1},
}
GPT_NEOX = {
    **PLAIN,
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_size": 96,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rotary_emb_base": 100.0,
}
PHI = {
    **PLAIN,
    "model_type": "phi",
    "architectures": ["PhiForCausalLM"],
    "hidden_size": 48,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.5,
}
CASES |= {
    "gemma": {**GEMMA, "rope_theta": 100.0, "attention_bias": True, "tie_word_embeddings": False},
    # As published: the rotation of full attention is stretched, that of the window has a base of its own.
    "gemma3_text": {
        **GEMMA3,
        "rope_theta": 300.0,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
        "sliding_window_pattern": 3,
    },
    "gemma3_text_nested": {
        **GEMMA3,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 300.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": False,
    },
    "gpt2": {**GPT2, "n_inner": None},
    "gpt2_scaled_by_layer": {
        **GPT2,
        "n_inner": 41,
        "scale_attn_by_inverse_layer_idx": True,
        "tie_word_embeddings": False,
    },
    "opt": {**OPT, "tie_word_embeddings": False},
    # As OPT-350M: norms after the sums, none at the end, embeddings narrower than the model.
    "opt_norm_after": {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 20, "tie_word_embeddings": False},
    "gpt_neox": {**GPT_NEOX, "rotary_pct": 0.25},
    "gpt_neox_serial": {**GPT_NEOX, "rotary_pct": 1.0, "use_parallel_residual": False},
    "phi": PHI,
    "phi_head_norms": {**PHI, "qk_layernorm": True, "num_key_value_heads": 2},
    "nemotron": {
        **{name: value for name, value in SIZES.items() if name != "rms_norm_eps"},
        "model_type": "nemotron",
        "architectures": ["NemotronForCausalLM"],
        "hidden_size": 48,
        "hidden_act": "relu2",
        "norm_eps": 1e-5,
        "rope_theta": 100.0,
    },
    "olmo3": {
        **SIZES,
        "model_type": "olmo3",
        "architectures": ["Olmo3ForCausalLM"],
        "hidden_size": 48,
        "hidden_act": "silu",
        "num_hidden_layers": 4,
        "rope_theta": 500000.0,
        "rope_scaling": {
            **{"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.5},
            **{"original_max_position_embeddings": 16, "attention_factor": 1.3},
        },
        "sliding_window": 7,
    },
}

QWEN3_5 = {
    **SIZES,
    "hidden_act": "silu",
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "linear_conv_kernel_dim": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
}
CASES |= {
    "lfm2": {
        **{name: value for name, value in SIZES.items() if name != "rms_norm_eps"},
        "model_type": "lfm2",
        "architectures": ["Lfm2ForCausalLM"],
        "hidden_size": 48,
        "intermediate_size": 60,
        "num_hidden_layers": 3,
        "norm_eps": 1e-5,
        "rope_theta": 100.0,
        "conv_bias": True,
        "conv_L_cache": 3,
        "block_multiple_of": 7,
        "block_ffn_dim_multiplier": 1.1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "qwen3_5_text": {**QWEN3_5, "model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"]},
    "qwen3_5_moe_text": {
        **{name: value for name, value in QWEN3_5.items() if name != "intermediate_size"},
        "model_type": "qwen3_5_moe_text",
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 11,
        "shared_expert_intermediate_size": 13,
    },
    "gemma4_text": {
        **SIZES,
        "model_type": "gemma4_text",
        "architectures": ["Gemma4ForCausalLM"],
        "num_hidden_layers": 3,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 0,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 300.0},
        },
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": False,
    },
}
BLOOM = {
    **{"model_type": "bloom", "architectures": ["BloomForCausalLM"], "vocab_size": 67, "hidden_size": 48, "n_layer": 2},
    **{"n_head": 6, "seq_length": 17, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False},
    **{"bos_token_id": 1, "eos_token_id": None, "pad_token_id": None},
}
CASES |= {
    "bloom": BLOOM,
    "smollm3": {
        **SIZES,
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "hidden_size": 48,
        "hidden_act": "silu",
        "num_hidden_layers": 4,
        "rope_theta": 100.0,
        "no_rope_layers": [1, 0, 1, 0],
        "use_sliding_window": True,
        "sliding_window": 7,
        "tie_word_embeddings": False,
    },
}
CASES["gemma4_text_experts"] = {
    **CASES["gemma4_text"],
    **{"enable_moe_block": True, "num_experts": 7, "top_k_experts": 3, "moe_intermediate_size": 11},
    **{"attention_k_eq_v": False, "num_global_key_value_heads": None},
}

GLM = {
    **SIZES,
    "hidden_act": "silu",
    "head_dim": 8,
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.5,
}
LAYER_NORMS = {**{name: value for name, value in SIZES.items() if name != "rms_norm_eps"}, "layer_norm_eps": 1e-5}
COHERE = {
    **LAYER_NORMS,
    "model_type": "cohere",
    "architectures": ["CohereForCausalLM"],
    "hidden_size": 48,
    "hidden_act": "silu",
    "rope_theta": 100.0,
    "logit_scale": 0.7,
}
STABLELM = {
    **LAYER_NORMS,
    "model_type": "stablelm",
    "architectures": ["StableLmForCausalLM"],
    "hidden_size": 96,
    "hidden_act": "silu",
    "rope_theta": 100.0,
    "use_qkv_bias": True,
}
FALCON = {
    **{"model_type": "falcon", "architectures": ["FalconForCausalLM"], "vocab_size": 67, "hidden_size": 48},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "layer_norm_epsilon": 1e-5, "rope_theta": 100.0},
    **{"max_position_embeddings": 64, "tie_word_embeddings": False},
    **{"bos_token_id": 1, "eos_token_id": None, "pad_token_id": None},
}
CASES |= {
    "glm": {**GLM, "model_type": "glm", "architectures": ["GlmForCausalLM"]},
    "glm4": {**GLM, "model_type": "glm4", "architectures": ["Glm4ForCausalLM"], "attention_bias": False},
    "ernie4_5": {
        **SIZES,
        "model_type": "ernie4_5",
        "architectures": ["Ernie4_5ForCausalLM"],
        "hidden_act": "silu",
        "head_dim": 8,
        "rope_theta": 100.0,
        "use_bias": True,
        "tie_word_embeddings": False,
    },
    "cohere": {**COHERE, "attention_bias": True, "tie_word_embeddings": False},
    "cohere_head_norms": {**COHERE, "use_qk_norm": True, "tie_word_embeddings": False},
    "cohere2": {
        **COHERE,
        "model_type": "cohere2",
        "architectures": ["Cohere2ForCausalLM"],
        "num_hidden_layers": 3,
        "sliding_window": 7,
        "sliding_window_pattern": 3,
        "tie_word_embeddings": False,
    },
    "stablelm": {**STABLELM, "partial_rotary_factor": 0.25},
    "stablelm_parallel": {
        **STABLELM,
        "partial_rotary_factor": 0.5,
        "qk_layernorm": True,
        "use_parallel_residual": True,
    },
    "exaone4": {
        **SIZES,
        "model_type": "exaone4",
        "architectures": ["Exaone4ForCausalLM"],
        "hidden_size": 48,
        "hidden_act": "silu",
        "num_hidden_layers": 4,
        "rope_theta": 100.0,
        "sliding_window": 7,
        "sliding_window_pattern": 2,
    },
    "ministral3": {
        **SIZES,
        "model_type": "ministral3",
        "architectures": ["Ministral3ForCausalLM"],
        "hidden_act": "silu",
        "head_dim": 8,
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 6},
            **{"beta_fast": 4.0, "beta_slow": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3},
        },
    },
    "falcon": FALCON,
    "falcon_two_norms": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    "falcon_serial": {**FALCON, "parallel_attn": False, "multi_query": False, "alibi": True, "bias": True},
}

MOE = {
    **SIZES,
    "hidden_act": "silu",
    "num_hidden_layers": 3,
    "vocab_size": 53,
}
MIXTRAL = {**MOE, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "intermediate_size": 19}
QWEN2_MOE = {
    **MOE,
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 11,
    "shared_expert_intermediate_size": 17,
    "rope_theta": 1000.0,
}
QWEN3_MOE = {
    **MOE,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 8,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 11,
    "norm_topk_prob": True,
    "rope_theta": 1000.0,
}
OLMOE = {
    **MOE,
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "hidden_size": 40,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "intermediate_size": 13,
    "rope_theta": 1000.0,
}
GRANITEMOE = {
    **MOE,
    "model_type": "granitemoe",
    "architectures": ["GraniteMoeForCausalLM"],
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "intermediate_size": 13,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.4,
    "logits_scaling": 0.7,
    "rope_theta": 1000.0,
}
DEEPSEEK = {
    **MOE,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 11,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "rope_theta": 100.0,
}
DEEPSEEK_V2 = {
    **DEEPSEEK,
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "topk_method": "greedy",
}
DEEPSEEK_V3 = {
    **DEEPSEEK,
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "n_group": 3,
    "topk_group": 2,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
GLM_MOE = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group")
GLM_MOE += ("topk_group", "first_k_dense_replace", "routed_scaling_factor", "norm_topk_prob")
DEEPSEEK_YARN = {
    "type": "yarn",
    "factor": 4.0,
    "beta_fast": 4,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 16,
}
GPT_OSS = {
    **MOE,
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "head_dim": 8,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 7,
    "swiglu_limit": 1.5,
    "attention_bias": True,
    "rope_theta": 1000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 16,
    },
}
MINIMAX = {
    **MOE,
    "model_type": "minimax",
    "architectures": ["MiniMaxForCausalLM"],
    "head_dim": 8,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "intermediate_size": 13,
    "block_size": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "full_attn_alpha_factor": 1.3,
    "full_attn_beta_factor": 0.7,
    "linear_attn_alpha_factor": 1.1,
    "linear_attn_beta_factor": 0.9,
    "mlp_alpha_factor": 1.2,
    "mlp_beta_factor": 0.8,
    "rope_theta": 1000.0,
}
QWEN3_NEXT = {
    **MOE,
    "model_type": "qwen3_next",
    "architectures": ["Qwen3NextForCausalLM"],
    "num_hidden_layers": 4,
    "head_dim": 16,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 11,
    "shared_expert_intermediate_size": 13,
    "norm_topk_prob": True,
    "rope_theta": 1000.0,
}

CASES |= {
    "mixtral": {**MIXTRAL, "head_dim": 8, "num_local_experts": 5, "num_experts_per_tok": 2, "rope_theta": 1000.0},
    "mixtral_window": {
        **MIXTRAL,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "sliding_window": 7,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    "qwen2_moe": QWEN2_MOE,
    "qwen2_moe_mixed": {
        **QWEN2_MOE,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "norm_topk_prob": True,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 3,
        "qkv_bias": False,
    },
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe_mixed": {
        **QWEN3_MOE,
        "num_hidden_layers": 2,
        "mlp_only_layers": [0],
        "norm_topk_prob": False,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 7,
        "tie_word_embeddings": True,
    },
    "olmoe": {**OLMOE, "clip_qkv": 1.1},
    "olmoe_renormalised": {**OLMOE, "num_key_value_heads": 5, "norm_topk_prob": True, "num_hidden_layers": 2},
    "granitemoe": GRANITEMOE,
    "deepseek_v2": {**DEEPSEEK_V2, "rope_scaling": DEEPSEEK_YARN},
    "deepseek_v2_groups": {
        **DEEPSEEK_V2,
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "n_group": 3,
        "topk_group": 1,
        "routed_scaling_factor": 1.7,
        "first_k_dense_replace": 0,
        "num_hidden_layers": 2,
    },
    "deepseek_v3": {**DEEPSEEK_V3, "rope_scaling": DEEPSEEK_YARN, "num_nextn_predict_layers": 1},
    "deepseek_v3_plain": {
        **DEEPSEEK_V3,
        "q_lora_rank": None,
        "rope_interleave": False,
        "attention_bias": True,
        "norm_topk_prob": False,
        "num_hidden_layers": 2,
    },
    "deepseek_v3_fp8": {
        **DEEPSEEK_V3,
        "num_hidden_layers": 2,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [8, 5],
        },
    },
    "gpt_oss": GPT_OSS,
    "gpt_oss_mxfp4": {
        **GPT_OSS,
        "num_hidden_layers": 2,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        },
    },
    "glm4_moe": {
        **MOE,
        **{name: value for name, value in DEEPSEEK_V3.items() if name in GLM_MOE},
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "head_dim": 8,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "use_qk_norm": True,
        "rope_theta": 1000.0,
        "num_nextn_predict_layers": 1,
    },
    "minimax": MINIMAX,
    "minimax_m2": {
        **MOE,
        "model_type": "minimax_m2",
        "architectures": ["MiniMaxM2ForCausalLM"],
        "head_dim": 8,
        "rotary_dim": 4,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "intermediate_size": 13,
        "rope_theta": 1000.0,
    },
    "qwen3_next": QWEN3_NEXT,
}


def implementations(config: dict[str, Any]) -> dict[str, str]:
    """Those of transformers that are the reference: the plain ones.

    Falcon's plain attention adds ALiBi's biases twice (its mask has them already); the other one adds them once.
    """
    attention = "sdpa" if config["model_type"] == "falcon" else "eager"
    return {"attn_implementation": attention, "experts_implementation": "eager"}


# Saved with one tensor per stack of experts, as transformers computes with them; the others as it saves them.
STACKED = {"mixtral", "qwen3_moe_mixed", "deepseek_v2_groups", "minimax", "granitemoe"}
