"""Reads the sizes of latent attention (MLA) in a GGUF file, where it is stored in either of two forms.

llama.cpp runs it absorbed, as attention with one head of keys and values as large as the latent: files of today have
the sizes of that head, beside them those of a head before it (`_mla`), and its weights split into two tensors. Older
files have the sizes and the weights of a head alone.
"""

from collections.abc import Mapping
from typing import Any

from decodax.models.checkpoints.gguf.key_values import KeyValues

_KEY, _VALUE = "attention.key_length", "attention.value_length"
KEYS = frozenset({f"{_KEY}_mla", f"{_VALUE}_mla", "attention.head_count_kv", "rope.scaling.yarn_log_multiplier"})


def latent_fields(fields: Mapping[str, Any], keys: KeyValues) -> dict[str, Any]:
    """The sizes within a head; nothing, and problems, for wrong ones."""
    rotary, latent = keys.size("rope.dimension_count"), fields["kv_lora_rank"]
    end = "_mla" if f"{_KEY}_mla" in keys.values else ""
    key, value = keys.size(_KEY + end), keys.size(_VALUE + end)
    if rotary is None or key is None or value is None:
        return {}
    if end:
        for name, size in {_KEY: latent + rotary, _VALUE: latent}.items():
            if keys.values.get(name, size) != size:
                keys.refuse(name, f"{size} (the size of the latent, and what rotates beside it) or absent")
    if key <= rotary:
        keys.refuse(_KEY + end, f"above {rotary} (rope.dimension_count)")
        return {}
    return {
        "num_key_value_heads": fields["num_attention_heads"],
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": key - rotary,
        "v_head_dim": value,
        **({"topk_method": "group_limited_greedy"} if _is_grouped_v2(fields) else {}),
    }


def _is_grouped_v2(fields: Mapping[str, Any]) -> bool:
    return fields["model_type"] == "deepseek_v2" and (fields["n_group"] or 1) > 1
