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

from decodax.layers.norm import RMSNormConfig
from decodax.models.config import BlockConfig, ModelConfig
from decodax.models.families import FAMILIES
from decodax.models.families._contract import Family
from decodax.models.families._layer import ACTIVATIONS, Layer
from decodax.models.hf_field_kinds import BOOLEANS, CHOICES, FROM_ZERO, LISTS, NULLABLE, NUMBERS
from decodax.models.hf_known_fields import NEUTRAL, WITHOUT_INFLUENCE
from decodax.models.hf_rope import ROPE_FIELDS, read_rope, rope_settings
from decodax.models.stored_formats import read_quantization

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def load_config(folder: Path) -> tuple[Family, ModelConfig]:
    """Reads `config.json` of a folder, or such a file itself.

    Raises FileNotFoundError without the file, ValueError when it is no JSON object or `read_config` refuses it.
    """
    path = folder if folder.is_file() else folder / "config.json"
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
    raw = _canonical(raw, family, problems)
    fields = _fields(raw, family, problems)
    context, blocks = (0, ()) if problems else _blocks(raw, fields, family, problems)
    _refuse_unknown(raw, family, problems)
    if problems:
        listed = f" {problems[0]}" if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems)
        raise ValueError(f"this config cannot be used:{listed}")
    softcap = fields.get("final_logit_softcapping")
    return family, ModelConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        max_position_embeddings=context,
        blocks=blocks,
        final_norm=_norm(fields, family),
        tie_embeddings=fields["tie_word_embeddings"],
        embedding_scale=family.embedding_scale(fields),
        logit_softcap=None if softcap is None else float(softcap),
        logit_scale=family.logit_scale(fields),
    )


def _canonical(raw: Mapping[str, Any], family: Family, problems: list[str]) -> Mapping[str, Any]:
    """The fields under the names that the family reads."""
    renamed = {name: value for name, value in raw.items() if name not in family.aliases}
    for alias, name in family.aliases.items():
        if raw.get(alias) is None:
            continue
        if renamed.setdefault(name, raw[alias]) != raw[alias]:
            problems.append(f"{alias} and {name} mean the same and differ: got {raw[alias]!r} and {renamed[name]!r}")
    return renamed


def _norm(fields: Mapping[str, Any], family: Family) -> RMSNormConfig:
    return RMSNormConfig(float(fields["rms_norm_eps"]), family.unit_offset_norms)


def _blocks(
    raw: Mapping[str, Any], fields: Mapping[str, Any], family: Family, problems: list[str]
) -> tuple[int, tuple[BlockConfig, ...]]:
    """The context in tokens, and every layer; no layers where there are problems."""
    settings = rope_settings(raw, family.default_rope, problems)
    context, base = fields["max_position_embeddings"], float(fields["rope_theta"])
    rotary_size = _rotary_size(fields, family, settings, problems)
    rope, context = read_rope(raw, settings, rotary_size, context, base, problems)
    kinds = _layer_kinds(raw, fields, family, problems)
    if problems or rope is None:
        return context, ()
    norm = _norm(fields, family)

    def block(index: int, kind: str) -> BlockConfig:
        layer = Layer(family, index, kind, fields, rope, settings, norm)
        mixer, feed_forward = family.mixer(layer), family.feed_forward(layer)
        return BlockConfig(mixer, feed_forward, norm, family.post_norms, *family.residuals(layer))

    try:
        return context, tuple(block(index, kind) for index, kind in enumerate(kinds))
    except ValueError as error:  # sizes that do not go together: what a layer's own config says of them
        problems.append(str(error))
        return context, ()


def _rotary_size(fields: Mapping[str, Any], family: Family, settings: Mapping[str, Any], problems: list[str]) -> int:
    """How many coordinates of each head rotate."""
    if family.rotary_size is not None:
        return family.rotary_size(fields)
    part = settings.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if "partial_rotary_factor" not in fields and part != 1.0:
        problems.append(f"partial_rotary_factor must be 1.0 (these families rotate whole heads), got {part!r}")
    elif not isinstance(part, int | float) or not 0 < part <= 1:
        problems.append(f"partial_rotary_factor must be a number above 0 and up to 1, got {part!r}")
    else:
        return int(fields["head_dim"] * part)
    return fields["head_dim"]


def _fields(raw: Mapping[str, Any], family: Family, problems: list[str]) -> dict[str, Any]:
    """The fields that the family reads, defaults filled in, checked for their kind."""
    fields: dict[str, Any] = {}
    for name in _SIZES:
        fields[name] = raw.get(name)
        if fields[name] is None:
            problems.append(f"{name} is missing: every {family.model_type} config must give it")
    uses_window = raw.get("use_sliding_window", family.defaults.get("use_sliding_window")) is not False
    for name, default in family.defaults.items():
        value = raw.get(name, default) if uses_window or name != "sliding_window" else None
        fields[name] = default if value is None and name not in NULLABLE else value
    for name, value in fields.items():
        if value is not None and (expected := _unexpected(name, value)):
            problems.append(f"{name} must be {expected}, got {value!r}")
    if problems:
        return fields
    if fields.get("num_key_value_heads", 0) is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if fields.get("head_dim", 0) is None:
        fields["head_dim"], rest = divmod(fields["hidden_size"], fields["num_attention_heads"])
        if rest:
            problems.append("head_dim is needed where hidden_size is no multiple of num_attention_heads")
    return fields


def _unexpected(name: str, value: Any) -> str | None:
    """What a field should have been, if it is something else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in ("hidden_act", "hidden_activation"):
        return None if value in ACTIVATIONS else f"one of {sorted(ACTIVATIONS)}"
    if name in CHOICES:
        return None if value in CHOICES[name] else f"one of {sorted(CHOICES[name])}"
    if name in BOOLEANS:
        return None if isinstance(value, bool) else "true or false"
    if name in LISTS:
        return None if isinstance(value, list) else LISTS[name]
    if name in NUMBERS:
        return None if is_number and math.isfinite(value) and value > 0 else "a positive number"
    smallest = 0 if name in FROM_ZERO else 1
    is_integer = is_number and isinstance(value, int)
    return None if is_integer and value >= smallest else f"a whole number from {smallest} on"


def _refuse_unknown(raw: Mapping[str, Any], family: Family, problems: list[str]) -> None:
    """Reports every field that is neither read nor known to be harmless; null says that a feature is not used."""
    read = {*_SIZES, *family.defaults, *ROPE_FIELDS, *family.ignored, *WITHOUT_INFLUENCE, "layer_types"}
    neutral = {**NEUTRAL, **family.fixed}
    for name in sorted(raw.keys() - read):
        value = raw[name]
        if value is None or (name in neutral and value == neutral[name]):
            continue
        if name == "quantization_config":
            try:
                read_quantization(value)
            except ValueError as error:
                problems.append(str(error))
        elif name in neutral:
            problems.append(
                f"{name} must be {json.dumps(neutral[name])} or absent, got {json.dumps(value)}: "
                f"no {family.model_type} model has another"
            )
        else:
            problems.append(
                f"{name} = {json.dumps(value)} is not understood and may change the result: "
                "remove it from config.json if you know that it does not"
            )


def _layer_kinds(raw: Mapping[str, Any], fields: Mapping[str, Any], family: Family, problems: list[str]) -> list[str]:
    """What each layer is, as `layer_types` or the family's rule says."""
    count, names = fields["num_hidden_layers"], sorted(family.kinds)
    by_rule = [family.layer_kind(fields, index) for index in range(count)]
    given = raw.get("layer_types")
    kinds = by_rule if given is None else given
    if len(kinds) != count or not family.kinds.issuperset(kinds):
        choices = " or ".join(repr(name) for name in names)
        problems.append(f"layer_types must hold {count} times {choices} (one per layer), got {kinds!r}")
    elif "layer_types" not in family.defaults and kinds != by_rule:
        problems.append(
            f"layer_types must be absent or {by_rule[:1]} throughout for {family.model_type}, got {kinds!r}"
        )
    elif "sliding_attention" in kinds and fields.get("sliding_window") is None:
        problems.append(
            "layers of type 'sliding_attention' need sliding_window (tokens), and where it is read "
            "use_sliding_window = true; got none"
        )
    return kinds
