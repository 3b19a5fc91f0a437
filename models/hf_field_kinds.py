"""What kind of value each field of a `config.json` must have; those in no list here are whole numbers from 1 on."""

# May be null for "none" or "derive it"; a null in any other field means that the default holds.
NULLABLE = frozenset(
    {
        "num_key_value_heads",
        "head_dim",
        "sliding_window",
        "layer_types",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "clip_qkv",
        "mlp_only_layers",
        "n_group",
        "topk_group",
        "n_shared_experts",
        "q_lora_rank",
    }
)
BOOLEANS = frozenset(
    {
        "tie_word_embeddings",
        "attention_bias",
        "qkv_bias",
        "mlp_bias",
        "use_sliding_window",
        "norm_topk_prob",
        "rope_interleave",
    }
)
LISTS = {
    "layer_types": "a list with one name per layer",
    "mlp_only_layers": "a list of layers (whole numbers)",
}
NUMBERS = frozenset(
    {
        "rms_norm_eps",
        "rope_theta",
        "partial_rotary_factor",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "clip_qkv",
        "routed_scaling_factor",
        "swiglu_alpha",
        "swiglu_limit",
        "embedding_multiplier",
        "logits_scaling",
        "residual_multiplier",
        "attention_multiplier",
        "full_attn_alpha_factor",
        "full_attn_beta_factor",
        "linear_attn_alpha_factor",
        "linear_attn_beta_factor",
        "mlp_alpha_factor",
        "mlp_beta_factor",
    }
)
FROM_ZERO = frozenset({"max_window_layers", "first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"})
CHOICES = {
    "topk_method": frozenset({"greedy", "group_limited_greedy"}),
}
