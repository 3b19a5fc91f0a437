"""Packs the names and shapes of a model's tensors, makes its config small, and reads how transformers rotates."""

import re
from collections.abc import Mapping
from typing import Any

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")
_SMALL = {
    **{"vocab_size": 67, "hidden_size": 96, "intermediate_size": 37, "num_hidden_layers": 6, "head_dim": 16},
    **{"num_attention_heads": 6, "moe_intermediate_size": 11, "shared_expert_intermediate_size": 13},
    **{
        "num_experts": 8,
        "num_local_experts": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
    },
    "n_shared_experts": 1,
    **{"q_lora_rank": 10, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 5},
    **{"sliding_window": 5, "max_window_layers": 3, "n_embd": 96, "n_layer": 6, "n_head": 6, "n_inner": 37},
    **{"d_model": 96, "n_layers": 6, "n_heads": 6, "ffn_dim": 37, "word_embed_proj_dim": 32, "global_head_dim": 32},
    **{"max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64},
}


def packed_header(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """{pattern with {} for the first two numbers in a name: [[shape, "0-31" or "0-31,0-127"], ...]}."""
    groups: dict[str, dict[tuple[int, ...], list[tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        indices = tuple(int(found) for found in _INDEX.findall(name)[:2])
        pattern = _INDEX.sub("{}", name, count=len(indices))
        groups.setdefault(pattern, {}).setdefault(shape, []).append(indices)
    return {
        pattern: [[list(shape), _spans(indices)] for shape, indices in by_shape.items()]
        for pattern, by_shape in groups.items()
    }


def _spans(indices: list[tuple[int, ...]]) -> str:
    """The indices as spans of each axis; every index of one axis has the same indices of the next."""
    if indices == [()]:
        return ""
    axes = [sorted(set(axis)) for axis in zip(*indices, strict=True)]
    count = 1
    for axis in axes:
        count *= len(axis)
    assert count == len(indices), "not a box of indices"
    return ",".join(";".join(_runs(axis)) for axis in axes)


def _runs(numbers: list[int]) -> list[str]:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number, number])
    return [f"{first}-{last}" for first, last in runs]


def shrunk(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that a small model of the same kind changes."""
    small: dict[str, Any] = {"pad_token_id": 0}  # that of a class may be beyond the small vocabulary
    small |= {name: size for name, size in _SMALL.items() if isinstance(raw.get(name), int)}
    heads, kv_heads = raw.get("num_attention_heads"), raw.get("num_key_value_heads")
    if isinstance(kv_heads, int):
        small["num_key_value_heads"] = 6 if kv_heads == heads else min(kv_heads, 2)
    if isinstance(raw.get("layer_types"), list):
        small["layer_types"] = raw["layer_types"][:6]
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(raw.get(name), Mapping) and "short_factor" in raw[name]:
            share = raw.get("partial_rotary_factor", raw[name].get("partial_rotary_factor", 1.0))
            count = int(16 * share) // 2
            cut = {key: raw[name][key][:count] for key in ("short_factor", "long_factor")}
            small[name] = {**raw[name], **cut}
    if isinstance(raw.get("n_group"), int):
        small |= {"n_group": min(raw["n_group"], 2), "topk_group": 1}
    return small


def rope_facts(config: Any, model: Any) -> dict[str, Any] | None:
    """Per kind of layers: the frequencies of a short and of a long row, and the factor of cos and sin."""
    import torch

    rotary = next((module for name, module in model.named_modules() if name.endswith("rotary_emb")), None)
    if rotary is None:
        return None
    fresh = type(rotary)(config=config)  # the model is on device meta, without memory
    kinds = sorted(set(config.layer_types)) if isinstance(getattr(fresh, "rope_type", None), dict) else [None]
    facts: dict[str, Any] = {}
    for kind in kinds:
        prefix, own = ("", {}) if kind is None else (f"{kind}_", {"layer_type": kind})
        if not hasattr(fresh, f"{prefix}inv_freq"):
            continue
        found: dict[str, Any] = {}
        for name, length in (("short", 2), ("long", 2 * config.max_position_embeddings)):
            fresh(torch.zeros(1, 1, 1), torch.tensor([[length - 1]]), **own)
            found[name] = frequency_facts(getattr(fresh, f"{prefix}inv_freq").tolist())
        found["magnitude"] = float(f"{float(getattr(fresh, f'{prefix}attention_scaling')):.6e}")
        facts[kind or ""] = found
    return facts


def frequency_facts(frequencies: list[float]) -> list[float]:
    """How many frequencies there are, four of them, and their sum."""
    count = len(frequencies)
    chosen = [frequencies[index] for index in (0, min(1, count - 1), count // 2, count - 1)]
    return [count, *(float(f"{item:.4e}") for item in (*chosen, sum(frequencies)))]
