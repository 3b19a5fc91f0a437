"""Reads how a model rotates positions from its `config.json`, in the spellings of transformers 4 and 5.

transformers 4 has `rope_theta` beside `rope_scaling` {"type" or "rope_type", "factor", ...}; 5 has one dictionary,
`rope_parameters` {"rope_type", "rope_theta", "factor", ...}. The length a model was trained with
(`original_max_position_embeddings`) stands in the dictionary or beside it; beside it wins, as in transformers.
"""

import math
from collections.abc import Mapping
from typing import Any

from decodax.layers.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    Scaling,
    YarnScaling,
)

ROPE_FIELDS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"})

_ALWAYS = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor"})
# Per rope type, the keys that must be there and those that may.
_KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    # transformers reads no original length for these two: the factor, or max_position_embeddings, says it all.
    "linear": (frozenset({"factor"}), frozenset({"original_max_position_embeddings"})),
    "dynamic": (frozenset({"factor"}), frozenset({"original_max_position_embeddings"})),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
        frozenset({"original_max_position_embeddings"}),
    ),
    "yarn": (
        frozenset(),
        frozenset(
            {
                "finetuned",  # how the model was made, in the first YaRN checkpoints
                "factor",
                "original_max_position_embeddings",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            }
        ),
    ),
    "longrope": (
        frozenset({"short_factor", "long_factor"}),
        frozenset({"factor", "original_max_position_embeddings", "attention_factor"}),
    ),
}
_ALIASES = {"su": "longrope"}  # the first name of longrope, in early Phi-3 files


def read_rope(
    raw: Mapping[str, Any],
    settings: Mapping[str, Any],
    rotary_size: int,
    max_position_embeddings: int,
    base: float,
    problems: list[str],
) -> tuple[Rope | None, int]:
    """The rotation of each head, and how many tokens of context it stretches `max_position_embeddings` to.

    settings: what `rope_settings` gave. rotary_size: how many coordinates of a head rotate. base: the `rope_theta`
        beside the dictionary, or the family's; one inside the dictionary wins.
    Appends what it cannot understand to `problems`; the rotation is None when there was something.
    """
    known_problems = len(problems)
    kind = settings.get("rope_type", settings.get("type", "default"))
    kind = _ALIASES.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in _KEYS:
        problems.append(f"rope_type must be one of {sorted(_KEYS)}, got {kind!r}")
        return None, max_position_embeddings
    required, optional = _KEYS[kind]
    if missing := sorted(key for key in required if settings.get(key) is None):
        problems.append(f"rope scaling {kind!r} needs {missing}, got only {sorted(settings)}")
    if unknown := sorted(settings.keys() - _ALWAYS - required - optional):
        problems.append(f"rope scaling {kind!r} has fields that decodax does not understand: {unknown}")
    for key in sorted(settings.keys() & (required | optional | {"rope_theta"})):
        value = settings[key]
        if key in ("short_factor", "long_factor"):
            _check_factor_list(key, value, rotary_size // 2, problems)
        elif key not in ("truncate", "finetuned") and not _is_positive(value):
            problems.append(f"{key} in the rope scaling must be a positive number, got {value!r}")
    beside = raw.get("original_max_position_embeddings")
    if beside is not None and not _is_positive(beside):
        problems.append(f"original_max_position_embeddings must be a positive number of tokens, got {beside!r}")
    if rotary_size % 2 or rotary_size < 2:
        problems.append(f"head_dim must be even (rotary embedding turns pairs), got {rotary_size} coordinates")
    if len(problems) > known_problems:
        return None, max_position_embeddings
    original_length = _original_length(raw, settings, max_position_embeddings)
    scaling = _scaling(kind, settings, max_position_embeddings, original_length)
    return Rope(rotary_size, float(settings.get("rope_theta", base)), scaling), _context(
        scaling, max_position_embeddings
    )


def rope_settings(raw: Mapping[str, Any], default: Mapping[str, Any] | None, problems: list[str]) -> dict[str, Any]:
    """The rope dictionary of either spelling, or `default` without one; fields that are null are left out."""
    given = {name: raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name)}
    for name, value in given.items():
        if not isinstance(value, Mapping):
            problems.append(f"{name} must be an object or null, got {value!r}")
            return {}
    if len(given) == 2 and given["rope_scaling"] != given["rope_parameters"]:
        problems.append("rope_scaling and rope_parameters are both given and differ: keep the one that is right")
    settings = next(iter(given.values()), default or {})
    return {key: value for key, value in settings.items() if value is not None}


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _check_factor_list(key: str, value: Any, num_pairs: int, problems: list[str]) -> None:
    if not isinstance(value, list) or len(value) != num_pairs or not all(_is_positive(item) for item in value):
        length = len(value) if isinstance(value, list) else "no list"
        problems.append(f"{key} must be a list of {num_pairs} positive numbers (half the head size), got {length}")


def _original_length(raw: Mapping[str, Any], settings: Mapping[str, Any], max_position_embeddings: int) -> int:
    beside = raw.get("original_max_position_embeddings")
    if beside is not None:
        return int(beside)
    return int(settings.get("original_max_position_embeddings", max_position_embeddings))


def _scaling(
    kind: str, settings: Mapping[str, Any], max_position_embeddings: int, original_length: int
) -> Scaling | None:
    factor = settings.get("factor")
    if kind == "linear":
        return LinearScaling(float(settings["factor"]))
    if kind == "dynamic":
        return DynamicScaling(float(settings["factor"]), max_position_embeddings)
    if kind == "llama3":
        low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
        return Llama3Scaling(float(settings["factor"]), low, high, original_length)
    factor = float(max_position_embeddings / original_length if factor is None else factor)
    if kind == "yarn":
        return YarnScaling(
            factor,
            original_length,
            _yarn_attention_factor(factor, settings),
            float(settings.get("beta_fast", 32)),
            float(settings.get("beta_slow", 1)),
            bool(settings.get("truncate", True)),
        )
    if kind == "longrope":
        attention_factor = settings.get("attention_factor")
        if attention_factor is None:
            attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_length))
        short, long = (tuple(float(item) for item in settings[name]) for name in ("short_factor", "long_factor"))
        return LongRopeScaling(short, long, original_length, float(attention_factor))
    return None


def _yarn_attention_factor(factor: float, settings: Mapping[str, Any]) -> float:
    """What multiplies cos and sin: 0.1 mscale ln(factor) + 1, as a ratio of two when both mscales are given."""

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if "attention_factor" in settings:
        return float(settings["attention_factor"])
    if "mscale" in settings and "mscale_all_dim" in settings:
        return magnitude(settings["mscale"]) / magnitude(settings["mscale_all_dim"])
    return magnitude(1.0)


def _context(scaling: Scaling | None, max_position_embeddings: int) -> int:
    """Tokens of context. These three scalings serve beyond `max_position_embeddings`; others state the result in it."""
    if isinstance(scaling, LinearScaling | DynamicScaling):
        return int(max_position_embeddings * max(scaling.factor, 1.0))
    if isinstance(scaling, YarnScaling):
        return max(max_position_embeddings, int(scaling.original_length * scaling.factor))
    return max_position_embeddings
