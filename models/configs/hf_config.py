"""Reads a Hugging Face `config.json` into a `ModelConfig`, as transformers does, and refuses what it cannot read.

The fields that a family reads get its defaults, a check of their kind (`field_kinds.py`) and of each other
(`field_relations.py`); `rope.py` reads the rotation; `unread_fields.py` handles all other fields. All problems are
reported together in one ValueError, with the file's own names.
"""

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from decodax.core.printable import printable
from decodax.models.checkpoints.formats.view import quantization_of
from decodax.models.checkpoints.model_files import parse_json_object, read_json_bytes
from decodax.models.checkpoints.model_source import ModelSource, is_gguf_path, source_of
from decodax.models.config import BlockConfig, ModelConfig
from decodax.models.configs.field_kinds import quoted, unexpected
from decodax.models.configs.field_relations import check_relations
from decodax.models.configs.rope import ANY_KIND, ROPE_FIELDS, RopeSettings, read_rope, rope_settings, unread_rope_keys
from decodax.models.configs.text_config import other_parts, text_fields
from decodax.models.configs.unread_fields import check_unread
from decodax.models.families import FAMILIES
from decodax.models.families.contract import Family
from decodax.models.families.layer import Layer

_FILE = "config.json"
_MAX_PROBLEMS = 20  # in one message
# From the other sizes where they are null or absent, in every family.
_DERIVED = ("num_key_value_heads", "head_dim")
_RENAMED_KINDS = {"attention": "full_attention", "mamba": "linear_attention"}  # early names in layer_types
_READ_ELSEWHERE = frozenset({"layer_types", "quantization_config", "quantization", "auto_map"})


@dataclass(frozen=True)
class _File:
    """A config.json that is being read.

    raw: its fields under the family's names.
    family: of the model.
    written: the family's name of a field -> its name in the file, if that differs.
    problems: what is refused.
    notes: what a warning tells.
    """

    raw: Mapping[str, Any]
    family: Family
    written: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def name(self, field_name: str) -> str:
        return self.written.get(field_name, field_name)


def load_config(place: Path | ModelSource) -> tuple[Family, ModelConfig]:
    """Reads the `config.json` of a source, of a folder or GGUF file, or such a file itself.

    Warns about what it ignores, naming the file.
    Raises FileNotFoundError without the file.
    Raises ValueError if it is no JSON object or `read_config` refuses it.
    """
    if isinstance(place, Path) and place.is_file() and not is_gguf_path(place):
        content, where = read_json_bytes(place), str(place)
    else:
        source = source_of(place)
        content, where = source.read(_FILE), source.where(_FILE)
        if content is None:
            raise FileNotFoundError(
                f"{source.path} has no {_FILE}: a model folder in Hugging Face format is expected, or a GGUF file"
            )
    raw = parse_json_object(content, where)
    try:
        family, config, notes = _read(raw)
    except ValueError as error:
        raise ValueError(f"{printable(where)}: {error}") from error
    _warn(notes, f"{printable(where)}: ")
    return family, config


def read_config(raw: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """The family and the frozen config that the fields of a `config.json` describe; warns about what it ignores.

    Raises ValueError for an unknown `model_type`, or with a list of every missing, malformed or refused field.
    """
    family, config, notes = _read(raw)
    _warn(notes, "")
    return family, config


def _warn(notes: list[str], where: str) -> None:
    if notes:
        warnings.warn(where + "; ".join(notes), UserWarning, stacklevel=3)


def _read(raw: Mapping[str, Any]) -> tuple[Family, ModelConfig, list[str]]:
    """Family, config, and notes for a warning."""
    left_out, whole = other_parts(raw), raw
    raw = text_fields(raw)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        where = f", the text_config of a {quoted(whole.get('model_type'))} model" if raw is not whole else ""
        near = difflib.get_close_matches(str(model_type)[:40], FAMILIES, 3, 0.6) or ["llama", "qwen3", "gemma3_text"]
        families = (
            f"the {len(FAMILIES)} families that decodax reads (such as {', '.join(near)}; `decodax methods` lists all)"
        )
        raise ValueError(f"model_type must be one of {families}, got {quoted(model_type)}{where}")
    file = _with_family_names(raw, FAMILIES[model_type])
    if left_out:
        file.notes.append(f"read as its text model ({model_type}), without what {', '.join(left_out)} describe")
    settings = rope_settings(file.raw, file.family, file.problems)
    fields = _fields(file)
    context, blocks = (0, ()) if file.problems else _blocks(file, fields, settings)
    _check_unread(file, settings)
    _check_quantization(file)
    if file.problems:
        raise ValueError(f"this config cannot be used:{_listed(file.problems)}")
    family = file.family
    config = ModelConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        max_position_embeddings=context,
        blocks=blocks,
        final_norm=(family.final_norm or family.norm)(fields),
        tie_embeddings=fields["tie_word_embeddings"],
        embedding=family.embedding(fields),
        head=family.head(fields),
    )
    return family, config, file.notes


def _listed(problems: list[str]) -> str:
    """Formats one problem on the line, several below it."""
    if len(problems) == 1:
        return f" {problems[0]}"
    more = [f"and {len(problems) - _MAX_PROBLEMS:,} more"] if len(problems) > _MAX_PROBLEMS else []
    return "".join(f"\n  - {problem}" for problem in [*problems[:_MAX_PROBLEMS], *more])


def _with_family_names(raw: Mapping[str, Any], family: Family) -> _File:
    """The fields under the names that the family reads."""
    file = _File({name: value for name, value in raw.items() if name not in family.aliases}, family)
    fields = dict(file.raw)
    for alias, name in family.aliases.items():
        if raw.get(alias) is None:
            continue
        if fields.get(name) is None:
            fields[name], file.written[name] = raw[alias], alias
        elif fields[name] != raw[alias]:
            file.problems.append(
                f"{alias} and {name} mean the same and differ: got {quoted(raw[alias])} and {quoted(fields[name])}"
            )
    return _File(fields, family, file.written, file.problems, file.notes)


def _fields(file: _File) -> dict[str, Any]:
    """The fields that the family reads, with defaults, checked for their kind and relations."""
    family, raw = file.family, file.raw
    fields = {name: raw.get(name, default) for name, default in family.defaults.items()}
    if fields.get("use_sliding_window") is False:  # a field of the families that read it; others keep their window
        fields["sliding_window"] = None
    if fields.get("rope_theta", 0) is None and any(
        _inner_base(raw.get(name)) for name in ("rope_scaling", "rope_parameters")
    ):
        fields["rope_theta"] = family.defaults["rope_theta"]
    for name, value in fields.items():
        if value is None and (name in family.nullable or name in _DERIVED or name in family.derived):
            continue
        if value is None and name not in raw:
            file.problems.append(f"{name} is missing: every {family.model_type} config must give it")
        elif expected := unexpected(name, value):
            file.problems.append(f"{file.name(name)} must be {expected}, got {quoted(value)}")
    if file.problems:
        return fields
    for name, derive in family.derived.items():
        if fields[name] is None:
            fields[name] = derive(fields)
    if fields.get("num_key_value_heads") is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if fields.get("head_dim") is None and family.rotary_size is None:
        _derive_head_size(file, fields)
    check_relations(fields, file.name, file.problems)
    file.problems.extend(family.unsupported(fields))
    for name, other in family.same_as.items():
        if raw.get(name) is not None and (raw[name] != fields[other] or isinstance(raw[name], bool)):
            file.problems.append(f"{name} must be {fields[other]} ({other}) or absent, got {quoted(raw[name])}")
    return fields


def _derive_head_size(file: _File, fields: dict[str, Any]) -> None:
    fields["head_dim"], rest = divmod(fields["hidden_size"], fields["num_attention_heads"])
    if rest and "head_dim" in file.family.defaults:
        file.problems.append("head_dim is needed where hidden_size is no multiple of num_attention_heads")
    elif rest:
        file.problems.append(
            f"{file.name('hidden_size')} must be a multiple of {file.name('num_attention_heads')}, got "
            f"{fields['hidden_size']} and {fields['num_attention_heads']}"
        )


def _inner_base(settings: Any) -> bool:
    return isinstance(settings, Mapping) and settings.get("rope_theta") is not None


def _blocks(
    file: _File, fields: Mapping[str, Any], settings: Mapping[str, RopeSettings]
) -> tuple[int, tuple[BlockConfig, ...]]:
    """The context in tokens, and every layer; no layers if there are problems."""
    family, context, ropes = file.family, fields["max_position_embeddings"], {}
    for kind, own in settings.items():
        named = (family.rope_by_kind or {}).get(kind, "rope_theta")
        base = float(fields[named] if isinstance(named, str) else named)
        rotary_size = _rotary_size(file, fields, kind, own)
        # Where only some layers are stretched, published files state the product as the context.
        notes = file.notes if kind == ANY_KIND else []
        rope, extended = read_rope(
            file.raw, own, rotary_size, fields["max_position_embeddings"], base, family, file.problems, notes
        )
        interleaved = family.interleaved_rope
        interleaved = bool(fields[interleaved] if isinstance(interleaved, str) else interleaved)
        ropes[kind] = rope and replace(rope, interleaved=interleaved)
        context = max(context, extended)
    kinds = _layer_kinds(file, fields)
    if file.problems:
        return context, ()
    norm, layers = family.norm(fields), []
    for index, kind in enumerate(kinds):
        of_kind = kind if kind in ropes else ANY_KIND
        own = settings.get(of_kind, RopeSettings())
        layers.append(Layer(family, index, kind, fields, ropes.get(of_kind), own.values, norm))
    return context, tuple(family.block(layer) for layer in layers)


def _rotary_size(file: _File, fields: Mapping[str, Any], kind: str, settings: RopeSettings) -> int:
    """The number of coordinates of each head of a kind of layers that rotate."""
    family, problems = file.family, file.problems
    inner, source = settings.values.get("partial_rotary_factor"), f"{settings.source}.partial_rotary_factor"
    if "partial_rotary_factor" not in fields:
        name = family.head_sizes.get(kind, "head_dim") if family.rotary_size is None else family.rotary_size
        if inner is not None and inner != 1 and settings.type != "proportional":
            problems.append(f"{source} must be 1.0 or absent (these families rotate whole heads), got {quoted(inner)}")
        if fields[name] % 2:
            derived = " (hidden_size / num_attention_heads where it is absent)" if name == "head_dim" else ""
            problems.append(f"{name}{derived} must be even: rotary embedding turns pairs, got {fields[name]}")
        return fields[name]
    outer = fields["partial_rotary_factor"]
    fraction, name = (outer, file.name("partial_rotary_factor")) if inner is None else (inner, source)
    fraction = 1.0 if fraction is None else fraction
    if expected := unexpected("partial_rotary_factor", fraction):
        problems.append(f"{name} must be {expected}, got {quoted(fraction)}")
        return fields["head_dim"]
    size = int(fields["head_dim"] * fraction)
    if size % 2 or not size:
        problems.append(
            f"{name} must let an even number of each head's {fields['head_dim']} coordinates (head_dim, or "
            f"{file.name('hidden_size')} / {file.name('num_attention_heads')}) rotate, got {size}"
        )
    return size


def _layer_kinds(file: _File, fields: Mapping[str, Any]) -> list[str]:
    """The kind of each layer, from `layer_types` or the family's rule."""
    family, problems = file.family, file.problems
    count: int = fields["num_hidden_layers"]
    given = file.raw.get("layer_types")
    by_rule = [family.layer_kind(fields, index) for index in range(count)]
    if given is None:
        kinds = by_rule
    elif expected := unexpected("layer_types", given):
        problems.append(f"layer_types must be {expected}, got {quoted(given)}")
        return by_rule
    else:
        kinds = [str(_RENAMED_KINDS.get(kind, kind)) for kind in given]
    if len(kinds) != count or not family.kinds.issuperset(kinds):
        choices = " or ".join(repr(name) for name in sorted(family.kinds))
        problems.append(
            f"layer_types must hold {count} times {choices} (one per layer, num_hidden_layers), got "
            f"{len(kinds):,}: {quoted(given)}"
        )
    elif "layer_types" not in family.defaults and kinds != by_rule:
        problems.append(
            f"layer_types must be absent or {by_rule[:1]} throughout for {family.model_type}, got {quoted(given)}"
        )
    elif "sliding_attention" in kinds and fields.get("sliding_window") is None:
        problems.append(
            "layers of type 'sliding_attention' need sliding_window (tokens), and where it is read "
            "use_sliding_window = true; got none"
        )
    return kinds


def _check_unread(file: _File, settings: Mapping[str, RopeSettings]) -> None:
    """Checks the fields, and keys of the rope dictionary, that nothing here reads."""
    raw, family, window = file.raw, file.family, file.raw.get("sliding_window")
    read = {*family.defaults, *family.same_as, *_READ_ELSEWHERE} | (ROPE_FIELDS if settings else frozenset())
    unread = raw.keys() - read
    if "sliding_window" not in family.defaults or raw.get("sliding_window", family.defaults["sliding_window"]) is None:
        unread -= {"use_sliding_window", "max_window_layers"}  # no layer has a window, whatever these say
    context = raw.get("max_position_embeddings", family.defaults["max_position_embeddings"])
    is_wide = isinstance(window, int) and isinstance(context, int) and window >= context
    if is_wide or raw.get("use_sliding_window") is False:
        unread -= {"sliding_window"}
    values, keys = dict(raw), []
    for own in settings.values():
        keys += unread_rope_keys(own, family)
        values |= {f"{own.source}.{key}": value for key, value in own.values.items()}
    check_unread(values, sorted(unread) + keys, family, file.problems, file.notes)


def _check_quantization(file: _File) -> None:
    try:
        quantization_of(file.raw)
    except ValueError as error:
        file.problems.append(str(error))
