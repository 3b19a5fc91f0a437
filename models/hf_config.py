"""Reads a Hugging Face `config.json` into a `ModelConfig`, and refuses what it does not understand.

Every field of the file is one of three: read (by the family or the rope reader), on the list of fields without
influence on the result, or on the list of fields with one harmless value. All others are reported together in one
ValueError, because a model computed with a field ignored looks right and is not.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from decodax.layers.feed_forward import GatedMLPConfig
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.norm import RMSNormConfig
from decodax.models.config import BlockConfig, ModelConfig
from decodax.models.families import FAMILIES
from decodax.models.families._contract import Family
from decodax.models.hf_known_fields import ADVICE, NEUTRAL, WITHOUT_INFLUENCE
from decodax.models.hf_rope import ROPE_FIELDS, read_rope

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# Fields that may be null for "none" or "derive it"; a null in any other field means that the default holds.
_NULLABLE = frozenset(
    {
        "num_key_value_heads",
        "head_dim",
        "sliding_window",
        "layer_types",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    }
)

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
}


def load_config(folder: Path) -> tuple[Family, ModelConfig]:
    """Reads `config.json` of a folder.

    Raises FileNotFoundError without the file, ValueError when it is no JSON object or `read_config` refuses it.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: a model folder in Hugging Face format is expected")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(raw).__name__}")
    try:
        return read_config(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_config(raw: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """The family and the frozen config that the fields of a `config.json` describe.

    Raises ValueError for an unknown `model_type`, and one that lists every missing, malformed or unknown field.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type must be one of {sorted(FAMILIES)} (the families decodax reads), got {model_type!r}"
        )
    family = FAMILIES[model_type]
    problems: list[str] = []
    fields = _fields(raw, family, problems)
    rope, context, windows = None, 0, []
    if not problems:
        context, base = fields["max_position_embeddings"], float(fields["rope_theta"])
        rope, context = read_rope(raw, fields["head_dim"], context, base, problems)
        windows = _windows(raw, fields, family, problems)
    _refuse_unknown(raw, family, problems)
    if problems or rope is None:
        raise ValueError("this config cannot be used:\n" + "\n".join(f"  - {problem}" for problem in problems))

    def flag(source: bool | str) -> bool:
        return fields[source] if isinstance(source, str) else source

    norm = RMSNormConfig(float(fields["rms_norm_eps"]), family.unit_offset_norms)
    scaled_by = fields[family.score_scale_field] if family.score_scale_field else fields["head_dim"]
    softcap = fields.get("attn_logit_softcapping")
    logit_softcap = fields.get("final_logit_softcapping")
    feed_forward = GatedMLPConfig(
        fields["intermediate_size"], _ACTIVATIONS[fields[family.activation_field]], flag(family.mlp_bias)
    )

    def block(window: int | None) -> BlockConfig:
        mixer = GQAConfig(
            num_heads=fields["num_attention_heads"],
            num_kv_heads=fields["num_key_value_heads"],
            head_size=fields["head_dim"],
            rope=rope,
            scale=float(scaled_by) ** -0.5,
            qkv_bias=flag(family.qkv_bias),
            out_bias=flag(family.out_bias),
            head_norm=norm if family.head_norms else None,
            window=window,
            softcap=None if softcap is None else float(softcap),
        )
        return BlockConfig(mixer, feed_forward, norm, family.post_norms)

    return family, ModelConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        max_position_embeddings=context,
        blocks=tuple(block(window) for window in windows),
        final_norm=norm,
        tie_embeddings=fields["tie_word_embeddings"],
        embedding_scale=math.sqrt(fields["hidden_size"]) if family.scaled_embedding else 1.0,
        logit_softcap=None if logit_softcap is None else float(logit_softcap),
    )


def _fields(raw: Mapping[str, Any], family: Family, problems: list[str]) -> dict[str, Any]:
    """The fields that the family reads, defaults filled in, checked for their kind."""
    fields: dict[str, Any] = {}
    for name in _SIZES:
        fields[name] = raw.get(name)
        if fields[name] is None:
            problems.append(f"{name} is missing: every {family.model_type} config must give it")
    for name, default in family.defaults.items():
        value = raw.get(name, default)
        fields[name] = default if value is None and name not in _NULLABLE else value
    for name, value in fields.items():
        if value is not None and (expected := _unexpected(name, value)):
            problems.append(f"{name} must be {expected}, got {value!r}")
    if problems:
        return fields
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if fields["head_dim"] is None:
        fields["head_dim"], rest = divmod(fields["hidden_size"], fields["num_attention_heads"])
        if rest:
            problems.append("head_dim is needed where hidden_size is no multiple of num_attention_heads")
    if fields.get("use_sliding_window") is False:
        fields["sliding_window"] = None
    return fields


def _unexpected(name: str, value: Any) -> str | None:
    """What a field should have been, if it is something else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in ("hidden_act", "hidden_activation"):
        return None if value in _ACTIVATIONS else f"one of {sorted(_ACTIVATIONS)}"
    if name in ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"):
        return None if isinstance(value, bool) else "true or false"
    if name == "layer_types":
        return None if isinstance(value, list) else "a list with one name per layer"
    if name in ("rms_norm_eps", "rope_theta", "query_pre_attn_scalar") or name.endswith("softcapping"):
        return None if is_number and math.isfinite(value) and value > 0 else "a positive number"
    smallest = 0 if name == "max_window_layers" else 1
    is_integer = is_number and isinstance(value, int)
    return None if is_integer and value >= smallest else f"a whole number from {smallest} on"


def _refuse_unknown(raw: Mapping[str, Any], family: Family, problems: list[str]) -> None:
    """Reports every field that is neither read nor known to be harmless; null says that a feature is not used."""
    read = {*_SIZES, *family.defaults, *ROPE_FIELDS, *family.ignored, *WITHOUT_INFLUENCE, "layer_types"}
    for name in sorted(raw.keys() - read):
        value = raw[name]
        if value is None or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        if name in NEUTRAL:
            advice = ADVICE.get(name, f"no {family.model_type} model has another")
            problems.append(f"{name} must be {json.dumps(NEUTRAL[name])} or absent, got {json.dumps(value)}: {advice}")
        else:
            problems.append(
                f"{name} = {json.dumps(value)} is not understood and may change the result: "
                "remove it from config.json if you know that it does not"
            )


def _windows(
    raw: Mapping[str, Any], fields: Mapping[str, Any], family: Family, problems: list[str]
) -> list[int | None]:
    """Each layer's window in tokens, the query included, or None for the whole context."""
    count, size = fields["num_hidden_layers"], fields.get("sliding_window")
    by_rule = [
        "sliding_attention" if family.slides is not None and family.slides(fields, layer) else "full_attention"
        for layer in range(count)
    ]
    given = raw.get("layer_types")
    kinds = by_rule if given is None else given
    if len(kinds) != count or not {"sliding_attention", "full_attention"}.issuperset(kinds):
        problems.append(
            f"layer_types must hold {count} times 'full_attention' or 'sliding_attention' (one per layer), "
            f"got {kinds!r}"
        )
    elif "layer_types" not in family.defaults and kinds != by_rule:
        problems.append(
            f"layer_types must be absent or {by_rule[:1]} throughout for {family.model_type}, got {kinds!r}"
        )
    elif "sliding_attention" in kinds and size is None:
        problems.append(
            "layers of type 'sliding_attention' need sliding_window (tokens), and where it is read "
            "use_sliding_window = true; got none"
        )
    return [size if kind == "sliding_attention" else None for kind in kinds]
