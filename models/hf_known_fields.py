"""The fields of a `config.json` that no family reads: what may stand there without changing the result.

A field is added here once it is known that transformers computes the same with any value (WITHOUT_INFLUENCE), or with
one value (NEUTRAL). All others are refused by `hf_config.py`.
"""

from typing import Any

WITHOUT_INFLUENCE = frozenset(
    {
        # what the file is, how it was saved and where it came from
        "model_type",
        "architectures",
        "auto_map",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "_from_model_config",
        "_attn_implementation",
        "attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_experts_implementation",
        "max_sequence_length",
        "model_max_length",
        "is_llama_config",
        "transformers.js_config",
        "unsloth_fixed",
        "unsloth_version",
        "license",
        # how a program runs it, or what it hands back
        "use_cache",
        "pretraining_tp",
        "return_dict",
        "return_dict_in_generate",
        "output_hidden_states",
        "output_attentions",
        "output_scores",
        "output_router_logits",
        "torchscript",
        "use_bfloat16",
        "tf_legacy_loss",
        "chunk_size_feed_forward",
        "tie_last_hidden_states",
        # training
        "initializer_range",
        "attention_dropout",
        "router_aux_loss_coef",
        "router_jitter_noise",
        # tokens with a meaning, which the tokenizer and the end of generation use
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "sep_token_id",
        "cls_token_id",
        "mask_token_id",
        "decoder_start_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "tokenizer_class",
        "prefix",
        # generation settings, which transformers 4 kept here
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        # other tasks and other kinds of model
        "tie_encoder_decoder",
        "cross_attention_hidden_size",
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "task_specific_params",
        "problem_type",
    }
)

# Harmless with this value only (or null): any other changes the result in a way that is not implemented. A family that
# reads the field takes precedence.
NEUTRAL: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "use_mrope": False,
    "use_bidirectional_attention": False,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "per_layer_config": {},
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
