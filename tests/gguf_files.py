"""Writes GGUF files by the format's description alone, and tiny models of tests/golden as llama.cpp has them.

Independent of decodax: what llama.cpp's converters do to names, orders of rows and norms is written here once more; the
names come from the package `gguf` (tests/golden_gguf/names.json, scripts/make_golden_gguf.py).
"""

import json
import re
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).parent
GOLDEN_GGUF = ROOT / "golden_gguf"
QUANTISED = GOLDEN_GGUF / "quantised.gguf"
NAMES = json.loads((GOLDEN_GGUF / "names.json").read_text())
# Fields of the golden configs that GGUF cannot hold: llama.cpp has these values in its code.
IN_CODE = {
    "llama_biases": {"hidden_act": "silu"},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gpt_oss": {"swiglu_limit": 7.0},
    "qwen3_moe": {"norm_topk_prob": True},
}
# YaRN's two scales, of which GGUF has one: in published models they are equal.
ONE_SCALE = {"deepseek_v2": "mscale_all_dim", "deepseek_v3": "mscale_all_dim"}
TYPE_NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "IQ2_XXS": 16, "I32": 26}
_KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "num_experts": "expert_count",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "clip_qkv": "attention.clamp_kqv",
    "n_routed_experts": "expert_count",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
}


def text(value):
    encoded = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def typed(value):
    """A value with its type's number before it."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return (4, struct.pack("<I", value)) if value >= 0 else (5, struct.pack("<i", value))
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str | bytes):
        return 8, text(value)
    items = [typed(item) for item in value]
    kind = items[0][0] if items else 8
    return 9, struct.pack("<IQ", kind, len(items)) + b"".join(content for _, content in items)


def key_values(metadata):
    return b"".join(text(key) + struct.pack("<I", kind) + raw for key, (kind, raw) in metadata.items())


def gguf_bytes(metadata, tensors, *, version=3, alignment=32):
    """A file: `tensors` maps names to (type's name, shape with the contiguous axis last, bytes)."""
    described = {key: typed(value) for key, value in metadata.items()}
    infos, data = b"", b""
    for name, (kind, shape, content) in tensors.items():
        axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        infos += text(name) + axes + struct.pack("<IQ", TYPE_NUMBERS[kind], len(data))
        data += content + b"\0" * (-len(content) % alignment)
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)) + key_values(described) + infos
    return header + b"\0" * (-len(header) % alignment) + data


def write_gguf(path, metadata, tensors, **options):
    path.write_bytes(gguf_bytes(metadata, tensors, **options))
    return path


def raw_config(case):
    """The golden config.json, with the values that llama.cpp has in its code."""
    raw = json.loads((ROOT / "golden" / case / "config.json").read_text()) | IN_CODE.get(case, {})
    if case in ONE_SCALE:
        raw["rope_scaling"] = raw["rope_scaling"] | {"mscale": raw["rope_scaling"][ONE_SCALE[case]]}
    return raw


def metadata_of(case, *, absorbed=True):
    """The key-values that llama.cpp's converter writes for a golden case."""
    raw, arch = raw_config(case), NAMES[case]["architecture"]
    head_size = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    found = {"general.architecture": arch}
    for field, key in _KEYS.items():
        if raw.get(field) is not None and not (field == "sliding_window" and arch not in ("gemma2", "gpt-oss")):
            found[f"{arch}.{key}"] = raw[field]
    found[f"{arch}.rope.dimension_count"] = head_size
    found[f"{arch}.vocab_size"] = raw["vocab_size"]
    if arch == "gpt-oss":
        found[f"{arch}.expert_feed_forward_length"] = raw["intermediate_size"]
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    found[f"{arch}.rope.freq_base"] = float(raw.get("rope_theta") or scaling.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type") or scaling.get("type", "default")
    if kind in ("linear", "yarn"):
        found[f"{arch}.rope.scaling.type"] = kind
        found[f"{arch}.rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
        found[f"{arch}.rope.scaling.factor"] = float(scaling["factor"])
    if arch == "deepseek2":
        found |= latent_metadata(raw, absorbed=absorbed)
    if kind == "yarn":
        for name in ("beta_fast", "beta_slow"):
            found[f"{arch}.rope.scaling.yarn_{name}"] = float(scaling[name])
    return found


def latent_metadata(raw, *, absorbed):
    """What the converter writes for latent attention: the sizes of the one large head, or (formerly) of the heads."""
    rotary, key = raw["qk_rope_head_dim"], raw["qk_nope_head_dim"] + raw["qk_rope_head_dim"]
    found = {"rope.dimension_count": rotary, "attention.key_length": key, "attention.value_length": raw["v_head_dim"]}
    if absorbed:
        latent = raw["kv_lora_rank"]
        found |= {"attention.key_length_mla": key, "attention.value_length_mla": raw["v_head_dim"]}
        found |= {
            "attention.key_length": latent + rotary,
            "attention.value_length": latent,
            "attention.head_count_kv": 1,
        }
    if raw["model_type"] == "deepseek_v3":
        found |= {"expert_gating_func": 2, "expert_weights_norm": raw["norm_topk_prob"]}
    if "rope_scaling" in raw:
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * raw["rope_scaling"]["mscale_all_dim"]
    return {f"deepseek2.{key}": value for key, value in found.items()}


def in_two(name, weights, raw):
    """The two tensors that the converter makes of the keys' and values' weights of latent attention."""
    heads, key, value = raw["num_attention_heads"], raw["qk_nope_head_dim"], raw["v_head_dim"]
    in_heads = weights.reshape(heads, key + value, -1)
    k_b = in_heads[:, :key].swapaxes(1, 2)
    return {name.replace("kv_b", "k_b"): k_b, name.replace("kv_b", "v_b"): in_heads[:, key:]}


def pairs_together(weights, heads):
    """The rows of each head in llama.cpp's order for llama: both halves of a rotated pair side by side."""
    size = len(weights) // heads
    rows = [
        head * size + half * size // 2 + pair for head in range(heads) for pair in range(size // 2) for half in (0, 1)
    ]
    return weights[rows]


def tensors_of(case, *, absorbed=True):
    """The tensors of a golden case in GGUF's names, as llama.cpp's converter stores them, float32."""
    raw, names = raw_config(case), NAMES[case]["names"]
    heads, kv_heads = raw["num_attention_heads"], raw.get("num_key_value_heads") or raw["num_attention_heads"]
    stored = load_file(ROOT / "golden" / case / "model.safetensors")
    found, stacks = {}, {}
    for name, weights in stored.items():
        ours = names[re.sub(r"experts\.\d+\.", "experts.{}.", name)]
        if NAMES[case]["architecture"] == "llama" and (".q_proj" in name or ".k_proj" in name):
            weights = pairs_together(weights, heads if ".q_proj" in name else kv_heads)
        if case == "gemma2" and name.endswith("norm.weight"):
            weights = weights + np.float32(1)
        if "experts.gate_up_proj" in name:
            gate, up = halves(case, name, weights)
            found |= {ours: gate, ours.replace("gate", "up"): up}
        elif ours in found or (".experts." in name and weights.ndim == 2 and "bias" not in name):
            stacks.setdefault(ours, []).append((int(name.split(".experts.")[1].split(".")[0]), weights))
        elif absorbed and ours.endswith("attn_kv_b.weight"):
            found |= in_two(ours, weights, raw)
        elif case == "gpt_oss" and name.endswith("experts.down_proj"):
            found[ours] = weights.swapaxes(1, 2)
        else:
            found[ours] = weights[0] if name.endswith("shared_expert_gate.weight") else weights
    stacked = {
        ours: np.stack([w for _, w in sorted(several, key=lambda one: one[0])]) for ours, several in stacks.items()
    }
    return found | stacked


def halves(case, name, weights):
    """Gates and ups of a tensor that holds both."""
    if case != "gpt_oss":
        return np.split(weights, 2, axis=1)
    weights = weights if name.endswith("_bias") else weights.swapaxes(1, 2)
    return weights[:, 0::2], weights[:, 1::2]


def float32_tensors(arrays):
    return {
        name: ("F32", array.shape, np.ascontiguousarray(array, np.float32).tobytes()) for name, array in arrays.items()
    }


def write_case(path, case, **more):
    """A golden case as a GGUF file in float32, with more key-values."""
    return write_gguf(path, metadata_of(case) | more, float32_tensors(tensors_of(case)))
