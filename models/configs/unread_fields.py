"""Handles the fields of a `config.json` that its family does not read: ignores, warns about or refuses them.

transformers ignores a field that the family's class does not know, and so does decodax, with one warning that lists
them. It refuses a field which means that the model is computed in another way than by transformers' class: the fields
in `CHANGES_ELSEWHERE`, and any unread field of a model that brings code of its own (`auto_map`).
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from decodax.core.printable import printable
from decodax.models.configs.field_kinds import quoted
from decodax.models.configs.known_fields import CHANGES_ELSEWHERE, CHECKED_TRANSFORMERS, NULL_IS_NO, WITHOUT_INFLUENCE
from decodax.models.families.contract import Family

_MAX_NAMES = 20  # in one message
_ALIKE = 0.85  # of 1: a letter or two differ
_LOADED_BY = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")  # keys of auto_map whose code computes the model
_OWN_CLASSES = ("config", "model", "forcausallm")  # what follows the family's name in the names of its classes


def check_unread(
    raw: Mapping[str, Any], unread: Sequence[str], family: Family, problems: list[str], notes: list[str]
) -> None:
    """Checks the unread fields.

    raw: the fields of the file.
    unread: the fields to check.
    family: of the model.
    problems: gets what is refused.
    notes: gets what is ignored.
    """
    neutral = {**CHANGES_ELSEWHERE, **{name: (value,) for name, value in family.fixed.items()}}
    ignored = []
    for name in unread:
        value = raw[name]
        is_absent = value is None and name not in NULL_IS_NO
        if is_absent or name in WITHOUT_INFLUENCE or name in family.ignored:
            continue
        if name not in neutral:
            ignored.append(name)
        elif not is_neutral(value, neutral[name]):
            problems.append(refusal(name, value, neutral[name], f"{family.model_type} models"))
    foreign = _foreign_classes(raw.get("auto_map"), family, problems)
    if foreign and ignored:
        problems.append(
            f"auto_map names code that is not {family.model_type}'s own ({foreign}), so {listed(ignored)} may change "
            "the result: remove these fields from config.json if you know that they do not"
        )
    elif foreign:
        notes.append(f"auto_map names code that decodax does not run ({foreign}): read as a {family.model_type} model")
    elif ignored:
        absent = [name for name in family.defaults if name not in raw]
        notes.append(
            f"{listed(ignored)}{_meant(ignored, absent)}: not read by {family.model_type} models in transformers "
            f"{CHECKED_TRANSFORMERS}, and ignored{_newer(raw.get('transformers_version'))}"
        )


def _meant(ignored: Sequence[str], absent: Sequence[str]) -> str:
    """Text with the family's fields that may have been misspelt; empty if no absent field is similar."""
    near = {name: difflib.get_close_matches(name, absent, 1, _ALIKE) for name in ignored[:_MAX_NAMES]}
    hints = [f"{match[0]} instead of {printable(name)}" for name, match in near.items() if match]
    return f" (was {', '.join(hints)} meant?)" if hints else ""


def is_neutral(value: Any, neutral: Sequence[Any]) -> bool:
    """Whether a value is one of the neutral ones; true is not 1 here, and false not 0."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)


def refusal(name: str, value: Any, neutral: Sequence[Any], models: str) -> str:
    """The error text for a field that must be neutral in these models.

    name, value: of the field.
    neutral: its neutral values.
    models: which models, for the message.
    """
    choices = " or ".join([*(quoted(other) for other in neutral), "absent"])
    remedy = "remove it from config.json if you know that it changes nothing"
    return f"{name} must be {choices}, got {quoted(value)}: {models} are computed with no other ({remedy})"


def listed(names: Sequence[str]) -> str:
    """The first names of a file's fields, to fit a message, and how many more there are."""
    shown = ", ".join(printable(name) for name in names[:_MAX_NAMES])
    return shown if len(names) <= _MAX_NAMES else f"{shown} and {len(names) - _MAX_NAMES:,} more"


def _foreign_classes(auto_map: Any, family: Family, problems: list[str]) -> str:
    """The model's classes in `auto_map` whose names are not those of the family's own."""
    if auto_map is None:
        return ""
    if not isinstance(auto_map, Mapping):
        problems.append(f"auto_map must be an object or null, got {quoted(auto_map)}")
        return ""
    own = {family.model_type.replace("_", "") + part for part in _OWN_CLASSES}
    named = [auto_map[key] for key in _LOADED_BY if isinstance(auto_map.get(key), str)]
    return listed([name for name in named if name.rpartition(".")[2].lower() not in own])


def _newer(version: Any) -> str:
    """Text for a file that was written by a newer transformers, which may know more fields; else empty."""
    found, checked = _numbers(version), _numbers(CHECKED_TRANSFORMERS)
    if found is None or checked is None or found <= checked:
        return ""
    return f"; the file was written by transformers {printable(version)}, which may read them"


def _numbers(version: Any) -> tuple[int, int] | None:
    """Major and minor number of a version, if it has them."""
    parts = version.split(".")[:2] if isinstance(version, str) and len(version) < 40 else []
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(part.isdecimal() for part in parts) else None
