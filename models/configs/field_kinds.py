"""Defines the kind and the largest value of each field of a `config.json`, and checks values against them.

A count in a file costs memory before a single weight is read (a description for each layer, a name for each expert), so
each has a limit, far above any published model: a file beyond it is damaged, or made to exhaust memory.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from decodax.core.printable import printable
from decodax.models.families.layer import ACTIVATION_NAMES

_MAX_QUOTED = 80  # characters of a value in a message: enough for every mistyped value

MAX_LAYERS = 4_096  # published models have up to about 130
MAX_HEADS = 4_096  # 232 in the largest published
MAX_EXPERTS = 16_384  # 2,048 in the largest published
MAX_SIZE = 2**20  # of hidden states, heads, latents, one expert: 1,048,576; published models have up to 65,536
MAX_VOCABULARY = 2**28  # 268 million tokens; the largest published has about a million
MAX_POSITION = 2**31 - 1  # positions are 32-bit integers
MAX_NUMBER = 1e30  # what float32 can hold, with room for its powers and products


class Kind(Protocol):
    """A kind of value that a field may have."""

    def unexpected(self, value: Any) -> str | None:
        """The expected kind as text, if `value` is something else."""
        ...


@dataclass(frozen=True)
class Whole:
    smallest: int = 1
    largest: int = MAX_SIZE

    def unexpected(self, value: Any) -> str | None:
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if is_integer and self.smallest <= value <= self.largest:
            return None
        return f"a whole number from {self.smallest} to {self.largest:,}"


@dataclass(frozen=True)
class Number:
    """A number greater than `above` and at most `largest`; with `or_zero`, also 0."""

    above: float = 0.0
    largest: float = MAX_NUMBER
    or_zero: bool = False

    def unexpected(self, value: Any) -> str | None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and (self.above < value <= self.largest or (self.or_zero and value == 0)):
            return None
        least = "a positive number" if self.above == 0 else f"a number above {self.above:g}"
        return f"{least}, at most {self.largest:g}{', or 0' if self.or_zero else ''}"


@dataclass(frozen=True)
class Flag:
    def unexpected(self, value: Any) -> str | None:
        return None if isinstance(value, bool) else "true or false"


@dataclass(frozen=True)
class Choice:
    names: frozenset[str]

    def unexpected(self, value: Any) -> str | None:
        return None if isinstance(value, str) and value in self.names else f"one of {sorted(self.names)}"


@dataclass(frozen=True)
class LayerPattern:
    """A number of layers that repeat, 0 for none, or a text with a letter for each: L with a window, G without."""

    def unexpected(self, value: Any) -> str | None:
        is_text = isinstance(value, str) and 0 < len(value) <= MAX_LAYERS and set(value) <= {"L", "G"}
        return None if is_text or not Whole(0, MAX_POSITION).unexpected(value) else "a whole number or a text like LLLG"


@dataclass(frozen=True)
class Listed:
    """A list of items that `is_item` accepts."""

    expected: str
    is_item: Callable[[Any], bool]

    def unexpected(self, value: Any) -> str | None:
        return None if isinstance(value, list) and all(map(self.is_item, value)) else self.expected


_SIZE = Whole()
_ACTIVATION = Choice(frozenset(ACTIVATION_NAMES))

KINDS: Mapping[str, Kind] = {
    "vocab_size": Whole(largest=MAX_VOCABULARY),
    "num_hidden_layers": Whole(largest=MAX_LAYERS),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "num_key_value_heads",
            "num_global_key_value_heads",
            "num_kv_heads",
            "linear_num_key_heads",
            "linear_num_value_heads",
        ),
        Whole(largest=MAX_HEADS),
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), Whole(largest=MAX_EXPERTS)),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "n_group", "topk_group"), Whole(largest=MAX_EXPERTS)),
    **dict.fromkeys(("hidden_size_per_layer_input", "num_kv_shared_layers"), Whole(0)),
    "n_shared_experts": Whole(0, MAX_EXPERTS),
    "shared_expert_intermediate_size": Whole(0),
    **dict.fromkeys(("max_position_embeddings", "sliding_window"), Whole(largest=MAX_POSITION)),
    "max_window_layers": Whole(0, MAX_POSITION),
    "first_k_dense_replace": Whole(0, MAX_POSITION),
    **dict.fromkeys(
        ("decoder_sparse_step", "full_attention_interval", "no_rope_layer_interval"), Whole(largest=MAX_POSITION)
    ),
    "sliding_window_pattern": LayerPattern(),
    **dict.fromkeys(("linear_conv_kernel_dim", "conv_L_cache"), Whole(2, 4_096)),  # tokens, including the newest
    # 16 times the widest state
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), Whole(largest=2**24)),
    "hidden_act": _ACTIVATION,
    "hidden_activation": _ACTIVATION,
    "activation_function": _ACTIVATION,
    "activation": _ACTIVATION,
    "topk_method": Choice(frozenset({"greedy", "group_limited_greedy"})),
    **dict.fromkeys(
        (
            "tie_word_embeddings",
            "attention_bias",
            "qkv_bias",
            "mlp_bias",
            "attention_out_bias",
            "use_bias",
            "enable_bias",
            "do_layer_norm_before",
            "_remove_final_layer_norm",
            "layer_norm_elementwise_affine",
            "use_parallel_residual",
            "apply_residual_connection_post_layernorm",
            "qk_layernorm",
            "use_qk_norm",
            "use_qkv_bias",
            "bias",
            "alibi",
            "multi_query",
            "new_decoder_architecture",
            "parallel_attn",
            "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx",
            "conv_bias",
            "block_auto_adjust_ff_dim",
            "attention_k_eq_v",
            "enable_moe_block",
            "use_double_wide_mlp",
            "use_sliding_window",
            "norm_topk_prob",
            "rope_interleave",
        ),
        Flag(),
    ),
    "layer_types": Listed("a list with the name of each layer's kind", lambda item: isinstance(item, str)),
    "no_rope_layers": Listed("a list of 0 and 1, one per layer", lambda item: item in (0, 1)),
    "full_attn_idxs": Listed("a list of layers (whole numbers)", lambda item: type(item) is int),
    "mlp_only_layers": Listed("a list of layers (whole numbers)", lambda item: type(item) is int),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), Number(above=1.0)),  # bases of powers that must grow
    "partial_rotary_factor": Number(largest=1.0),
    **dict.fromkeys(
        (
            "rms_norm_eps",
            "norm_epsilon",
            "norm_eps",
            "layer_norm_eps",
            "layer_norm_epsilon",
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "clip_qkv",
            "routed_scaling_factor",
            "swiglu_alpha",
            "swiglu_limit",
            "embedding_multiplier",
            "logit_scale",
            "logits_scaling",
            "residual_multiplier",
            "attention_multiplier",
            "block_ffn_dim_multiplier",
            "full_attn_alpha_factor",
            "full_attn_beta_factor",
            "linear_attn_alpha_factor",
            "linear_attn_beta_factor",
            "mlp_alpha_factor",
            "mlp_beta_factor",
        ),
        Number(),
    ),
}


def unexpected(name: str, value: Any) -> str | None:
    """The expected kind of a field as text, if its value is something else; fields not in KINDS are sizes."""
    return KINDS.get(name, _SIZE).unexpected(value)


def quoted(value: Any) -> str:
    """A value of a file as JSON, cut to fit a message.

    >>> quoted([None, "a" * 100])
    '[null, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...'
    """
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # from Python: no JSON, or a number of thousands of digits
        return f"a value of type {type(value).__name__}"
    text = printable(text[: _MAX_QUOTED + 1])
    return text if len(text) <= _MAX_QUOTED else text[: _MAX_QUOTED - 3] + "..."
