"""Holds the key-values of a GGUF file's architecture, and refuses those that change results and are not read."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from decodax.core.printable import printable
from decodax.models.checkpoints.gguf.architectures import Architecture
from decodax.models.checkpoints.gguf.rope import READ as ROPE_KEYS

_MAX_NOTED = 8  # keys in a warning
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
    **dict.fromkeys(("attention.key_length_mla", "attention.value_length_mla"), ()),
    **dict.fromkeys(("attention.q_lora_rank", "attention.kv_lora_rank", "attention.layer_norm_epsilon"), ()),
    "attention.sliding_window_pattern": (2,),
    "expert_gating_func": (0, 1),
    "pooling_type": (0,),
}


@dataclass(frozen=True)
class KeyValues:
    """The key-values of an architecture.

    name: of the architecture, which every key begins with.
    values: by key, without that name.
    problems: what is refused.
    """

    name: str
    values: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, metadata: Mapping[str, Any], name: str) -> "KeyValues":
        """Those of a file."""
        prefix = f"{name}."
        own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        return cls(name, {key: _tidy(value) for key, value in own.items()})

    def refuse(self, key: str, expected: str) -> None:
        """Adds a problem."""
        got = f"got {printable(repr(self.values[key]))}" if key in self.values else "it is missing"
        self.problems.append(f"{self.name}.{key} must be {expected}, {got}")

    def size(self, key: str) -> int | None:
        """The whole number from 1 on that a key has; None, and a problem, for anything else."""
        value = self.values.get(key)
        if type(value) is int and value > 0:
            return value
        self.refuse(key, "a whole number from 1 on")
        return None


def _tidy(value: Any) -> Any:
    """A value as a config.json has it: the shortest decimal of a float32, one number for equal ones of all layers."""
    if isinstance(value, float):
        with np.errstate(over="ignore"):
            return float(str(np.float32(value)))
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        return _tidy(value[0])
    return value


def check_unread(keys: KeyValues, architecture: Architecture, read: Set[str]) -> list[str]:
    """Refuses keys that change results and are not read; gives a note of all others that are not.

    read: further keys that were read.
    """
    for key, expected in architecture.in_code.items():
        if key in keys.values and keys.values[key] != expected:
            keys.refuse(key, f"{expected} or absent")
    known = {*architecture.fields, *architecture.in_code, *_CHECKED, *_WITHOUT_INFLUENCE, *ROPE_KEYS, *read}
    unread = keys.values.keys() - known
    for key in sorted(unread & _NEUTRAL.keys()):
        if keys.values[key] not in _NEUTRAL[key]:
            allowed = " or ".join(str(value) for value in _NEUTRAL[key])
            keys.refuse(key, f"{allowed} or absent" if allowed else f"absent for {architecture.model_type}")
    unknown = sorted(unread - _NEUTRAL.keys())
    if not unknown:
        return []
    listed = ", ".join(f"{keys.name}.{printable(key)}" for key in unknown[:_MAX_NOTED])
    return [f"{len(unknown)} key-value(s) are not understood and have no influence here: {listed}"]
