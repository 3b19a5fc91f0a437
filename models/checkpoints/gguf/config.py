"""Translates the key-values of a GGUF file into the fields of a `config.json`, which the config reader then checks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from decodax.core.printable import printable
from decodax.models.checkpoints.gguf.architectures import ARCHITECTURES, Architecture
from decodax.models.checkpoints.gguf.files import GGUFFiles
from decodax.models.checkpoints.gguf.names import EMBEDDING, HEAD, ROPE_FACTORS
from decodax.models.checkpoints.gguf.rope import READ as ROPE_KEYS
from decodax.models.checkpoints.gguf.rope import rope_scaling

TOKENS = "tokenizer.ggml.tokens"
_MAX_NOTED = 8  # keys in a warning
_ROPE_BASE = 10000.0  # llama.cpp's, for files that do not say
# Keys that a file may lack; the family's defaults are llama.cpp's for them.
_OPTIONAL = frozenset(
    {
        "rope.freq_base",
        "attention.head_count_kv",
        "attention.clamp_kqv",
        "attention.sliding_window",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    }
)
_DECIMAL = frozenset({"rms_norm_eps", "rope_theta", "clip_qkv", "attn_logit_softcapping", "final_logit_softcapping"})
_CHECKED = frozenset({"vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length"})
# The width of gpt-oss's dense layers, of which it has none, and what the shapes of tensors say.
_WITHOUT_INFLUENCE = frozenset({"tensor_data_layout", "feed_forward_length", "expert_shared_count"})
# Keys that change what llama.cpp computes: only these values compute what the family does, where it does not read them.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attention.causal",), (True,)),
    **dict.fromkeys(("use_parallel_residual", "swin_norm"), (False,)),
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale", "expert_weights_scale"), (0, 1)),
    **dict.fromkeys(("attention.scale", "attention.output_scale", "attention.max_alibi_bias"), (0,)),
    **dict.fromkeys(("attention.clamp_kqv", "attention.sliding_window", "attention.shared_kv_layers"), (0,)),
    **dict.fromkeys(("attention.temperature_scale", "attention.temperature_length"), (0,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping"), (0,)),
    **dict.fromkeys(("expert_count", "expert_used_count", "leading_dense_block_count", "nextn_predict_layers"), (0,)),
    **dict.fromkeys(("expert_group_count", "expert_group_used_count", "interleave_moe_layer_step"), (0, 1)),
    **dict.fromkeys(("rope.dimension_sections", "rope.freq_base_swa", "rope.scaling.yarn_log_multiplier"), ()),
    **dict.fromkeys(("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"), ()),
    **dict.fromkeys(("attention.q_lora_rank", "attention.kv_lora_rank", "attention.layer_norm_epsilon"), ()),
    "attention.sliding_window_pattern": (2,),
    "expert_gating_func": (0, 1),
    "pooling_type": (0,),
}


@dataclass(frozen=True)
class GGUFConfig:
    """What the key-values of a file say.

    architecture: of the model.
    fields: of a `config.json`.
    notes: what a warning tells.
    """

    architecture: Architecture
    fields: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Keys:
    """The key-values of an architecture.

    name: of the architecture, which every key begins with.
    values: by key, without that name.
    problems: what is refused.
    """

    name: str
    values: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)

    def refuse(self, key: str, expected: str) -> None:
        got = f"got {printable(repr(self.values[key]))}" if key in self.values else "it is missing"
        self.problems.append(f"{self.name}.{key} must be {expected}, {got}")


def read_gguf_config(files: GGUFFiles) -> GGUFConfig:
    """The architecture of a file, and the fields that its key-values mean.

    Raises ValueError for an architecture that is not read, and with a list of the keys that are missing or refused.
    """
    name = files.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"general.architecture must be one of {', '.join(ARCHITECTURES)} (the architectures that are read from "
            f"GGUF), got {printable(repr(name))}"
        )
    prefix, architecture = f"{name}.", ARCHITECTURES[name]
    keys = _Keys(name, {k.removeprefix(prefix): _tidy(v) for k, v in files.metadata.items() if k.startswith(prefix)})
    if architecture.with_experts is not None and keys.values.get("expert_count"):
        architecture = architecture.with_experts
    fields = _fields(files, architecture, keys)
    notes = _check_unread(architecture, keys)
    if keys.problems:
        raise ValueError(f"its key-values cannot be used: {'; '.join(keys.problems)}")
    return GGUFConfig(architecture, fields, tuple(notes))


def _tidy(value: Any) -> Any:
    """A value as a config.json has it: the shortest decimal of a float32, one number for equal ones of all layers."""
    if isinstance(value, float):
        with np.errstate(over="ignore"):
            return float(str(np.float32(value)))
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        return _tidy(value[0])
    return value


def _fields(files: GGUFFiles, architecture: Architecture, keys: _Keys) -> dict[str, Any]:
    fields = {"architectures": [architecture.class_name], "model_type": architecture.model_type}
    for key, field_name in architecture.fields.items():
        value = keys.values.get(key)
        if value in (None, 0) and key in _OPTIONAL:
            continue
        kind = (int, float) if field_name in _DECIMAL else (int,)
        if value is not None and type(value) in kind and value > 0:
            fields[field_name] = value
        else:
            keys.refuse(key, "a number above 0" if float in kind else "a whole number from 1 on, alike in all layers")
    fields |= architecture.constants
    fields["tie_word_embeddings"] = HEAD not in files.tensors
    for field_name, tensor in architecture.bias_fields.items():
        fields[field_name] = f"blk.0.{tensor}" in files.tensors
    fields["vocab_size"] = _vocab_size(files, keys)
    if EMBEDDING in files.tensors:
        fields["torch_dtype"] = files.tensors[EMBEDDING].dtype.name
    for name in ("bos_token_id", "eos_token_id"):
        if type(token := files.metadata.get(f"tokenizer.ggml.{name}")) is int:
            fields[name] = token
    if keys.problems:
        return fields
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    fields["head_dim"] = head_size = _head_size(fields, keys)
    fields.setdefault("rope_theta", _ROPE_BASE)
    if head_size is None:
        return fields
    if architecture.model_type == "gemma2":
        fields["query_pre_attn_scalar"] = _gemma2_scalar(fields, head_size)
    fields["rope_scaling"] = rope_scaling(
        keys.values,
        _rope_factors(files, head_size, keys),
        fields["rope_theta"],
        fields["max_position_embeddings"],
        truncates=architecture.yarn_truncates,
        problems=keys.problems,
    )
    return fields


def _vocab_size(files: GGUFFiles, keys: _Keys) -> int | None:
    """The rows of the embedding, which must be as many as the tokens."""
    if EMBEDDING not in files.tensors:
        keys.problems.append(f"the tensor {EMBEDDING} is missing")
        return None
    size = files.tensors[EMBEDDING].shape[0] if files.tensors[EMBEDDING].shape else 0
    if keys.values.get("vocab_size", size) != size:
        keys.refuse("vocab_size", f"{size} (the rows of {EMBEDDING})")
    tokens = files.metadata.get(TOKENS)
    if isinstance(tokens, list) and len(tokens) != size:
        keys.problems.append(f"{TOKENS} must have {size} tokens (the rows of {EMBEDDING}), got {len(tokens)}")
    return size


def _head_size(fields: Mapping[str, Any], keys: _Keys) -> int | None:
    """The size of a head, which must be that of its keys, of its values, and of what rotates; None for a wrong one."""
    size, rest = divmod(fields["hidden_size"], fields["num_attention_heads"])
    if "attention.key_length" in keys.values:
        size = keys.values["attention.key_length"]
        if type(size) is not int or size < 1:
            keys.refuse("attention.key_length", "a whole number from 1 on")
            return None
    elif rest:
        keys.refuse("attention.key_length", "given where embedding_length is no multiple of attention.head_count")
        return None
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.values.get(key, size) != size:
            keys.refuse(key, f"{size} (the size of a head) or absent")
    return size


def _gemma2_scalar(fields: Mapping[str, Any], head_size: int) -> int:
    """What scales the scores: the size of a head, but for the largest model, which llama.cpp knows by its layers."""
    return fields["hidden_size"] // fields["num_attention_heads"] if fields["num_hidden_layers"] == 46 else head_size


def _rope_factors(files: GGUFFiles, head_size: int, keys: _Keys) -> np.ndarray | None:
    """What divides the frequency of each rotated pair; None if the file does not say."""
    if ROPE_FACTORS not in files.tensors:
        return None
    tensor = files.tensors[ROPE_FACTORS]
    if tensor.shape != (head_size // 2,) or tensor.kind != "F32":
        keys.problems.append(
            f"{ROPE_FACTORS} must be F32 [{head_size // 2}] (half the size of a head), got {tensor.kind} "
            f"{list(tensor.shape)}"
        )
        return None
    factors = tensor.rows(slice(0, 1))[0].astype(np.float64)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        keys.problems.append(f"{ROPE_FACTORS} must hold positive numbers")
        return None
    return factors


def _check_unread(architecture: Architecture, keys: _Keys) -> list[str]:
    """Refuses keys that change results and are not read; a note of all others that are not."""
    unread = keys.values.keys() - {*architecture.fields, *_CHECKED, *_WITHOUT_INFLUENCE, *ROPE_KEYS}
    for key in sorted(unread & _NEUTRAL.keys()):
        if keys.values[key] not in _NEUTRAL[key]:
            allowed = " or ".join(str(value) for value in _NEUTRAL[key])
            keys.refuse(key, f"{allowed} or absent" if allowed else f"absent for {architecture.model_type}")
    weighed = keys.values.get("expert_weights_norm")
    if weighed is not None and weighed is not architecture.constants.get("norm_topk_prob", True):
        keys.refuse("expert_weights_norm", str(architecture.constants.get("norm_topk_prob", True)))
    unknown = sorted(unread - _NEUTRAL.keys() - {"expert_weights_norm"})
    if not unknown:
        return []
    listed = ", ".join(f"{keys.name}.{printable(key)}" for key in unknown[:_MAX_NOTED])
    return [f"{len(unknown)} key-value(s) are not understood and have no influence here: {listed}"]
