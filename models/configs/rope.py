"""Reads a model's rotary position embedding (RoPE) from its `config.json`, as transformers 4 and 5 spell it.

transformers 4 has `rope_theta` beside `rope_scaling` {"type" or "rope_type", "factor", ...}; 5 has one dictionary,
`rope_parameters` {"rope_type", "rope_theta", "factor", ...}. The length a model was trained with
(`original_max_position_embeddings`) is in the dictionary or beside it; beside it wins, as in transformers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from decodax.layers.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    Rope,
    Scaling,
    YarnScaling,
)
from decodax.models.configs.field_kinds import MAX_POSITION, Flag, Kind, Number, quoted
from decodax.models.configs.known_fields import ROPE_CHANGES_ELSEWHERE, ROPE_WITHOUT_INFLUENCE
from decodax.models.configs.unread_fields import is_neutral, refusal
from decodax.models.families.contract import Family

ANY_KIND = ""  # of layers, where all rotate alike
ROPE_FIELDS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"})

_ALWAYS = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor"})
# Per rope type, the required keys and the optional ones.
_KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    # transformers reads no original length for these two: only the factor, or max_position_embeddings.
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
        frozenset({"original_max_position_embeddings"}),
    ),
    "yarn": (
        frozenset(),
        frozenset(
            {
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
    "proportional": (frozenset({"partial_rotary_factor"}), frozenset({"factor"})),
}
_SCALING_KEYS = frozenset().union(*(required | optional for required, optional in _KEYS.values())) - _ALWAYS
_ALIASES = {"su": "longrope"}  # the first name of longrope, in early Phi-3 files
_FACTOR_LISTS = ("short_factor", "long_factor")
_LENGTH = Number(above=1, largest=MAX_POSITION)
_FACTOR = Number(largest=1e6)  # a thousand times the largest published
_KINDS: Mapping[str, Kind] = {
    "rope_theta": Number(above=1),
    **dict.fromkeys(("original_max_position_embeddings", "max_position_embeddings"), _LENGTH),
    "truncate": Flag(),
    "partial_rotary_factor": Number(largest=1.0),
    # 0 means "not given", as in transformers
    **dict.fromkeys(
        ("mscale", "mscale_all_dim", "beta_fast", "beta_slow", "llama_4_scaling_beta"),
        Number(largest=1e6, or_zero=True),
    ),
}


@dataclass(frozen=True)
class RopeSettings:
    """The rope dictionary of a file.

    source: its field, for messages.
    values: its keys without nulls.
    """

    source: str = "rope_parameters"
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def type(self) -> Any:
        kind = self.values.get("rope_type", self.values.get("type", "default"))
        return _ALIASES.get(kind, kind) if isinstance(kind, str) else kind


def rope_settings(raw: Mapping[str, Any], family: Family, problems: list[str]) -> dict[str, RopeSettings]:
    """The rope dictionary of each kind of layers, of ANY_KIND where all rotate alike; empty for a family without."""
    if "rope_theta" not in family.defaults and family.rope_by_kind is None:
        return {}
    flat = _flat_settings(raw, family.default_rope, problems)
    if family.rope_by_kind is None:
        return {ANY_KIND: flat}
    own: dict[str, RopeSettings] = {}
    for kind in family.rope_by_kind:
        if flat.source == "rope_scaling" or not flat.values:
            own[kind] = RopeSettings(flat.source, flat.values if kind == "full_attention" else {})
            continue
        values, source = flat.values.get(kind, {}), f"{flat.source}.{kind}"
        if not isinstance(values, Mapping):
            problems.append(f"{source} must be an object or null, got {quoted(values)}")
            values = {}
        own[kind] = RopeSettings(source, {key: value for key, value in values.items() if value is not None})
    if flat.source == "rope_parameters" and (unknown := sorted(flat.values.keys() - family.rope_by_kind.keys())):
        problems.append(
            f"rope_parameters must have an object for each kind of layer ({', '.join(sorted(family.rope_by_kind))}), "
            f"got {quoted(unknown)}"
        )
    return own


def _flat_settings(raw: Mapping[str, Any], default: Mapping[str, Any] | None, problems: list[str]) -> RopeSettings:
    """The rope dictionary in either spelling, or `default` without one."""
    given = {name: raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name) not in (None, {})}
    for name, value in given.items():
        if not isinstance(value, Mapping):
            problems.append(f"{name} must be an object or null, got {quoted(value)}")
            return RopeSettings()
    if len(given) == 2 and given["rope_scaling"] != given["rope_parameters"]:
        problems.append("rope_scaling and rope_parameters are both given and differ: keep the one that is right")
    if not given:
        return RopeSettings(values={} if raw.get("rope_parameters") is not None else default or {})
    source, values = next(iter(given.items()))
    # transformers takes a null `truncate` for false, and other nulls for "not given".
    values = {key: False if key == "truncate" and value is None else value for key, value in values.items()}
    return RopeSettings(source, {key: value for key, value in values.items() if value is not None})


def read_rope(
    raw: Mapping[str, Any],
    settings: RopeSettings,
    rotary_size: int,
    max_position_embeddings: int,
    base: float,
    family: Family,
    problems: list[str],
    notes: list[str],
) -> tuple[Rope | None, int]:
    """The rotation of each head, and the model's context in tokens with it.

    raw: the fields of the file.
    settings: its rope dictionary.
    rotary_size: number of coordinates of a head that rotate.
    max_position_embeddings: of the file, in tokens.
    base: the `rope_theta` beside the dictionary, or the family's; one inside the dictionary wins.
    family: of the model.
    problems: gets what cannot be understood; the rotation is None then.
    notes: gets what is ambiguous.
    """
    known_problems = len(problems)
    kind, values = settings.type, settings.values
    if not isinstance(kind, str) or kind not in _KEYS:
        problems.append(f"{settings.source}.rope_type must be one of {sorted(_KEYS)}, got {quoted(kind)}")
        return None, max_position_embeddings
    _check_keys(settings, kind, rotary_size, family.rope_keys, problems)
    beside = raw.get("original_max_position_embeddings")
    if beside is not None and (expected := _LENGTH.unexpected(beside)):
        problems.append(f"original_max_position_embeddings must be {expected} (tokens), got {quoted(beside)}")
    if len(problems) > known_problems or rotary_size % 2 or rotary_size < 2:  # which the caller reports
        return None, max_position_embeddings
    original_length = int(beside or values.get("original_max_position_embeddings", max_position_embeddings))
    if kind != "default" and original_length < 2:
        length = _length_name(raw, settings)
        problems.append(f"{length} must be at least 2 (tokens) for rope type {kind}, got {original_length}")
        return None, max_position_embeddings
    scaling = _scaling(kind, values, rotary_size, max_position_embeddings, original_length)
    context = _context(scaling, max_position_embeddings)
    if context > MAX_POSITION:
        length = _length_name(raw, settings)
        problems.append(f"{settings.source}.factor x {length} must be at most {MAX_POSITION:,}, got {context:,}")
        return None, max_position_embeddings
    _note_context(settings, scaling, original_length, max_position_embeddings, notes)
    return Rope(rotary_size, float(values.get("rope_theta", base)), scaling), context


def _length_name(raw: Mapping[str, Any], settings: RopeSettings) -> str:
    """The field with the length of the rows that the model was trained with."""
    name = "original_max_position_embeddings"
    if raw.get(name) is not None:
        return name
    return f"{settings.source}.{name}" if name in settings.values else "max_position_embeddings"


def unread_rope_keys(settings: RopeSettings, family: Family) -> list[str]:
    """The keys of the dictionary that its type does not read and that may have a meaning, as `field.key`."""
    required, optional = _KEYS.get(settings.type, ((), ())) if isinstance(settings.type, str) else ((), ())
    known = {*_ALWAYS, *required, *optional, *family.rope_keys, *ROPE_WITHOUT_INFLUENCE, *ROPE_CHANGES_ELSEWHERE}
    return [f"{settings.source}.{key}" for key in sorted(settings.values.keys() - known)]


def _check_keys(
    settings: RopeSettings, kind: str, rotary_size: int, own_keys: frozenset[str], problems: list[str]
) -> None:
    """Appends to `problems` what is missing, of the wrong kind, or may change the result elsewhere."""
    source, values = settings.source, settings.values
    required, optional = _KEYS[kind]
    if missing := sorted(required - values.keys()):
        problems.append(f"{source}.{missing[0]} is missing: rope type {kind} needs {', '.join(sorted(required))}")
    for key in sorted(values):
        value, name = values[key], f"{source}.{key}"
        if key in _FACTOR_LISTS and key in required:
            _check_factor_list(name, value, rotary_size // 2, problems)
        elif key in (*required, *optional, *own_keys, "rope_theta", "original_max_position_embeddings"):
            if expected := _KINDS.get(key, _FACTOR).unexpected(value):
                problems.append(f"{name} must be {expected}, got {quoted(value)}")
        elif key in ROPE_CHANGES_ELSEWHERE and not is_neutral(value, ROPE_CHANGES_ELSEWHERE[key]):
            problems.append(refusal(name, value, ROPE_CHANGES_ELSEWHERE[key], f"models with rope type {kind}"))
        elif isinstance(value, Mapping):
            problems.append(f"{name} must be absent, got an object: all layers of these models rotate alike")
        elif kind == "default" and key in _SCALING_KEYS - ROPE_WITHOUT_INFLUENCE - ROPE_CHANGES_ELSEWHERE.keys():
            problems.append(f"{name} needs a {source}.rope_type that reads it, got none or 'default'")
    if kind == "dynamic" and rotary_size < 4:
        problems.append(f"{source}.rope_type dynamic needs at least 4 coordinates of each head that rotate")
    low, high = values.get("low_freq_factor"), values.get("high_freq_factor")
    if kind == "llama3" and isinstance(low, int | float) and isinstance(high, int | float) and not low < high:
        problems.append(
            f"{source}.high_freq_factor must be above {source}.low_freq_factor, got {quoted(high)} and {quoted(low)}"
        )


def _check_factor_list(name: str, value: Any, num_pairs: int, problems: list[str]) -> None:
    if not isinstance(value, list) or len(value) != num_pairs or any(_FACTOR.unexpected(item) for item in value):
        got = f"a list of {len(value):,}" if isinstance(value, list) else quoted(value)
        problems.append(f"{name} must be a list of {num_pairs} positive numbers (half the head size), got {got}")


def _scaling(
    kind: str, values: Mapping[str, Any], rotary_size: int, max_position_embeddings: int, original_length: int
) -> Scaling | None:
    factor = values.get("factor")
    if kind == "proportional":
        num_rotating = int(values["partial_rotary_factor"] * rotary_size // 2)
        return ProportionalScaling(num_rotating, 1.0 if factor is None else float(factor))
    if kind == "linear":
        return LinearScaling(float(values["factor"]))
    if kind == "dynamic":
        return DynamicScaling(float(values["factor"]), max_position_embeddings)
    if kind == "llama3":
        low, high = float(values["low_freq_factor"]), float(values["high_freq_factor"])
        return Llama3Scaling(float(values["factor"]), low, high, original_length)
    factor = float(max_position_embeddings / original_length if factor is None else factor)
    if kind == "yarn":
        return YarnScaling(
            factor,
            original_length,
            _yarn_attention_factor(factor, values),
            float(values.get("beta_fast") or 32),
            float(values.get("beta_slow") or 1),
            values.get("truncate", True),
        )
    if kind == "longrope":
        attention_factor = values.get("attention_factor")
        if attention_factor is None:
            attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_length))
        short, long = (tuple(float(item) for item in values[name]) for name in _FACTOR_LISTS)
        return LongRopeScaling(short, long, original_length, float(attention_factor))
    return None


def _yarn_attention_factor(factor: float, values: Mapping[str, Any]) -> float:
    """The factor of cos and sin: 0.1 mscale ln(factor) + 1, or a ratio of two if both mscales are given."""
    if "attention_factor" in values:
        return float(values["attention_factor"])
    growth = 0.1 * math.log(max(factor, 1.0))
    if values.get("mscale") and values.get("mscale_all_dim"):
        return (values["mscale"] * growth + 1) / (values["mscale_all_dim"] * growth + 1)
    return growth + 1


def _context(scaling: Scaling | None, max_position_embeddings: int) -> int:
    """Tokens of context.

    YaRN states the original length, so its product with the factor is known. Linear and dynamic scaling do not, and
    published files differ: in some `max_position_embeddings` is the length before scaling, as vLLM assumes (it
    multiplies), in others the product (deepseek-coder: 16,384 = 4 x 4,096). transformers has no limit at all. The
    smaller of the two readings is safe for every file: no model is run beyond what it was trained for.
    """
    if isinstance(scaling, YarnScaling):
        return max(max_position_embeddings, int(scaling.original_length * scaling.factor))
    return max_position_embeddings


def _note_context(
    settings: RopeSettings, scaling: Scaling | None, original_length: int, context: int, notes: list[str]
) -> None:
    """Notes that the context may be larger, unless the original length shows that it is the product already."""
    if not isinstance(scaling, LinearScaling | DynamicScaling) or original_length * scaling.factor <= context:
        return
    notes.append(
        f"the context is max_position_embeddings = {context:,} tokens; if that is the length before "
        f"{settings.source}.factor = {scaling.factor:g}, the model may serve up to {int(context * scaling.factor):,}"
    )
