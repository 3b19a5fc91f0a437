"""Checks the fields of `quantization_config`: each must be known, and have a value that is supported."""

from collections.abc import Collection, Mapping
from typing import Any

from decodax.core.printable import printable


def require_known(field: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raises ValueError for fields that are not understood; `where` names the object that has them."""
    if unknown := sorted(str(name) for name in field.keys() - set(known)):
        raise ValueError(f"{where} has fields that are not understood: {printable(unknown)}")


def choice(field: Mapping[str, Any], name: str, choices: Collection[Any], default: Any, where: str) -> Any:
    """The value of a field that must be one of a few; true is not 1 here."""
    value = field.get(name, default)
    if not any(value == other and type(value) is type(other) for other in choices):
        listed = " or ".join(str(other) for other in choices)
        raise ValueError(f"quantization_config.{name} must be {listed} {where}, got {printable(repr(value))}")
    return value


def size(field: Mapping[str, Any], name: str, default: int | None, where: str, *, or_minus_one: bool = False) -> int:
    """The value of a field that must be a whole number from 1 on, or also -1."""
    value = field.get(name, default)
    if type(value) is not int or not (value >= 1 or (or_minus_one and value == -1)) or value > 2**31:
        also = " or -1" if or_minus_one else ""
        raise ValueError(
            f"quantization_config.{name} must be a whole number from 1 on{also} {where}, got {printable(repr(value))}"
        )
    return value


def empty(field: Mapping[str, Any], names: Collection[str], where: str) -> None:
    """Raises ValueError for a field with a value that would change what the weights mean."""
    for name in names:
        if field.get(name) not in (None, False, {}, []):
            raise ValueError(
                f"quantization_config.{name} must be null, empty or absent {where}, got {printable(repr(field[name]))}"
            )


def texts(field: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    """The value of a field that must be a list of texts, null or absent."""
    value = field.get(name)
    if value is not None and not (isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)):
        raise ValueError(
            f"quantization_config.{name} must be a list of texts or null {where}, got {printable(repr(value))}"
        )
    return tuple(value or ())
