"""Translates the key-values of a GGUF file into the fields of a `config.json`, which the config reader then checks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from decodax.core.printable import printable
from decodax.models.checkpoints.gguf.architectures import ARCHITECTURES, Architecture
from decodax.models.checkpoints.gguf.files import GGUFFiles
from decodax.models.checkpoints.gguf.key_values import KeyValues, check_unread
from decodax.models.checkpoints.gguf.latent_attention import KEYS as LATENT_KEYS
from decodax.models.checkpoints.gguf.latent_attention import latent_fields
from decodax.models.checkpoints.gguf.names import EMBEDDING, HEAD, ROPE_FACTORS
from decodax.models.checkpoints.gguf.rope import rope_scaling

TOKENS = "tokenizer.ggml.tokens"
_ROPE_BASE = 10000.0  # llama.cpp's, for files that do not say
# Keys that a file may lack, or have as 0; the family's defaults, or the architecture's constants, are llama.cpp's then.
_OPTIONAL = frozenset(
    {
        *("rope.freq_base", "attention.head_count_kv", "attention.q_lora_rank", "leading_dense_block_count"),
        *("attention.clamp_kqv", "attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
        *("expert_shared_count", "expert_weights_scale", "expert_weights_norm"),
        *("expert_group_count", "expert_group_used_count"),
    }
)
_WHOLE, _DECIMAL, _FLAG = "a whole number from 1 on, alike in all layers", "a number above 0", "true or false"
_KINDS = {
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "clip_qkv", "routed_scaling_factor"), _DECIMAL),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), _DECIMAL),
    "norm_topk_prob": _FLAG,
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
    keys = KeyValues.of(files.metadata, name)
    architecture = ARCHITECTURES[name].variant(keys.values) or ARCHITECTURES[name]
    fields = _fields(files, architecture, keys)
    notes = check_unread(keys, architecture, LATENT_KEYS if architecture.is_latent else frozenset())
    if architecture.model_type == "deepseek_v3" and fields["n_group"] is None:
        notes.append("it has no groups of experts (expert_group_count): experts are chosen from all, as llama.cpp does")
    if keys.problems:
        raise ValueError(f"its key-values cannot be used: {'; '.join(keys.problems)}")
    return GGUFConfig(architecture, fields, tuple(notes))


def _fields(files: GGUFFiles, architecture: Architecture, keys: KeyValues) -> dict[str, Any]:
    fields = {"architectures": [architecture.class_name], "model_type": architecture.model_type}
    fields |= {**architecture.constants, **_translated(architecture, keys)}
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
    fields.setdefault("rope_theta", _ROPE_BASE)
    fields |= latent_fields(fields, keys) if architecture.is_latent else _head_fields(fields, keys)
    rotary_size = fields.get("qk_rope_head_dim" if architecture.is_latent else "head_dim")
    if rotary_size is None:
        return fields
    if architecture.model_type == "gemma2":
        fields["query_pre_attn_scalar"] = _gemma2_scalar(fields)
    fields["rope_scaling"] = rope_scaling(
        keys.values,
        _rope_factors(files, rotary_size, keys),
        fields["rope_theta"],
        fields["max_position_embeddings"],
        truncates=architecture.yarn_truncates,
        scales_scores=architecture.is_latent,
        problems=keys.problems,
    )
    return fields


def _translated(architecture: Architecture, keys: KeyValues) -> dict[str, Any]:
    """The fields that are a key-value each."""
    fields = {}
    for key, name in architecture.fields.items():
        value, kind = keys.values.get(key), _KINDS.get(name, _WHOLE)
        if key in _OPTIONAL and (value is None or (kind is not _FLAG and value == 0)):
            continue
        types = {_WHOLE: (int,), _DECIMAL: (int, float), _FLAG: (bool,)}[kind]
        if value is not None and type(value) in types and (kind is _FLAG or value > 0):
            fields[name] = value
        else:
            keys.refuse(key, kind)
    return fields


def _vocab_size(files: GGUFFiles, keys: KeyValues) -> int | None:
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


def _head_fields(fields: Mapping[str, Any], keys: KeyValues) -> dict[str, int]:
    """The size of a head, which must be that of its keys, its values and what rotates; nothing for a wrong one."""
    size, rest = divmod(fields["hidden_size"], fields["num_attention_heads"])
    if "attention.key_length" in keys.values:
        size = keys.size("attention.key_length")
    elif rest:
        keys.refuse("attention.key_length", "given where embedding_length is no multiple of attention.head_count")
        size = None
    if size is None:
        return {}
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.values.get(key, size) != size:
            keys.refuse(key, f"{size} (the size of a head) or absent")
    return {"head_dim": size}


def _gemma2_scalar(fields: Mapping[str, Any]) -> int:
    """What scales the scores: the size of a head, but for the largest model, which llama.cpp knows by its layers."""
    largest = fields["num_hidden_layers"] == 46
    return fields["hidden_size"] // fields["num_attention_heads"] if largest else fields["head_dim"]


def _rope_factors(files: GGUFFiles, rotary_size: int, keys: KeyValues) -> np.ndarray | None:
    """What divides the frequency of each rotated pair; None if the file does not say."""
    if ROPE_FACTORS not in files.tensors:
        return None
    tensor = files.tensors[ROPE_FACTORS]
    if tensor.shape != (rotary_size // 2,) or tensor.kind != "F32":
        keys.problems.append(
            f"{ROPE_FACTORS} must be F32 [{rotary_size // 2}] (half the size of a head), got {tensor.kind} "
            f"{list(tensor.shape)}"
        )
        return None
    factors = tensor.rows(slice(0, 1))[0].astype(np.float64)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        keys.problems.append(f"{ROPE_FACTORS} must hold positive numbers")
        return None
    return factors
