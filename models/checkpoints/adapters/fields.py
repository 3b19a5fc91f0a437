"""Reads the fields of `adapter_config.json`: each must have a value that is supported."""

import re
from collections.abc import Mapping
from typing import Any

from decodax.core.printable import printable, printable_list

_MOST_RANK = 2**16
_MOST_CHARACTERS, _MOST_REPEATS = 200, 4  # of a pattern: a longer search could take for ever

OTHERWISE = "merge the adapter with the PEFT library (`merge_and_unload`, then `save_pretrained`)"

Names = tuple[str, ...]


class FieldError(ValueError):
    """A field has a value that is not supported; the file's name is added where it is known."""


def shown(value: Any) -> str:
    """The value in an error message."""
    return printable(repr(value))


def one_of(fields: Mapping[str, Any], name: str, choices: tuple[Any, ...]) -> Any:
    """The value of a field that must be one of a few; true is not 1 here."""
    value = fields.get(name)
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        listed = printable_list([repr(choice) for choice in choices if choice is not None], len(choices))
        raise FieldError(f"{name} must be one of {listed}, got {shown(value)}: {OTHERWISE}")
    return value


def read_rank(value: Any, name: str) -> int:
    """A rank, in the field of this name."""
    if type(value) is not int or not 1 <= value <= _MOST_RANK:
        raise FieldError(f"{name} must be a whole number in 1..{_MOST_RANK}, got {shown(value)}")
    return value


def finite(value: Any, name: str) -> float:
    """A finite number, in the field of this name."""
    if type(value) not in (int, float) or not abs(value) <= 1e30:  # also refuses NaN
        raise FieldError(f"{name} must be a finite number, got {shown(value)}")
    return float(value)


def by_pattern(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The value of a field that must be an object whose names are regular expressions."""
    value = fields.get(name) or {}
    if not isinstance(value, dict):
        raise FieldError(f"{name} must be an object of numbers by names of modules, got {shown(value)}")
    regular(tuple(value), name)
    return value


def texts(fields: Mapping[str, Any], name: str) -> Names:
    """The value of a field that must be a list of texts, one text, or null."""
    value = fields.get(name)
    value = [value] if isinstance(value, str) and value else value or []
    if not (isinstance(value, list) and all(isinstance(entry, str) for entry in value)):
        raise FieldError(f"{name} must be a list of texts or null, got {shown(value)}")
    return tuple(value)


def regular(patterns: Names, name: str) -> Names:
    """The regular expressions, if they are such and their search is quick."""
    for pattern in patterns:
        repeats = len(re.findall(r"[*+{]", pattern))
        is_nested = re.search(r"\)\s*[*+{?]|\\[1-9]|\(\?[^:]", pattern) is not None
        if len(pattern) > _MOST_CHARACTERS or repeats > _MOST_REPEATS or is_nested:
            raise FieldError(
                f"{name} has the pattern {shown(pattern)}: at most {_MOST_CHARACTERS} characters, {_MOST_REPEATS} "
                "repetitions, and none of a group, are allowed"
            )
        try:
            re.compile(f"({pattern})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise FieldError(f"{name} has {shown(pattern)}, which is no regular expression: {error}") from None
    return patterns
