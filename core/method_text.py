"""Reads a method and its options from one text, as in strategy="medusa:24,epsilon=0.1".

The grammar is NAME[:VALUE][,option=value]...: options are the fields of the method's dataclass, and VALUE is its first.
"""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from decodax.core.arguments import refusal

_FORM = "NAME[:VALUE][,option=value]..."
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def method_from_text(
    what: str,
    text: str,
    methods: Mapping[str, Any],
    *,
    otherwise: str = "",
    apart: Mapping[str, Any] | None = None,
) -> Any:
    """The method that a text names: an instance of its class with the options; a function as it is.

    what: the argument, for messages.
    text: as above.
    methods: by name: frozen dataclasses, which check their options, and functions, which have none.
    otherwise: what else the message names as possible.
    apart: options that came beside the text.
    Raises ValueError for a name or an option that does not exist, or one that is given twice or has no value.
    """
    name, items = _split(what, text)
    if name not in methods:
        near = difflib.get_close_matches(name, methods, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} must be one of {sorted(methods)}{otherwise}, got {text!r}{hint}")
    method = methods[name]
    known = option_names(method)
    given: dict[str, Any] = {}
    for option, value in [*((option, _value(value)) for option, value in items), *(apart or {}).items()]:
        option = option or (known[0] if known else "")
        if option not in known:
            expected = f"its options are {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"{what} {name!r} has no option {option or value}: {expected}")
        if option in given:
            raise ValueError(f"{option} is given twice: {given[option]} and {value}, with {what}={text!r}")
        given[option] = _of_kind(option, value, get_type_hints(method)[option])
    return method(**given) if inspect.isclass(method) else method


def option_names(method: Any) -> list[str]:
    """The options of a method, in order: the fields of its dataclass; none for a function."""
    if not inspect.isclass(method) or not dataclasses.is_dataclass(method):
        return []
    return [field.name for field in dataclasses.fields(method) if field.init]


def _split(what: str, text: str) -> tuple[str, list[tuple[str, str]]]:
    """The name, and pairs of option and value; the option of a VALUE is ""."""
    found = re.fullmatch(r"\s*([^:,=\s]*)\s*(?:([:,])(.*))?", text, re.DOTALL)
    name, mark, rest = found.groups() if found else (text, None, None)
    items = []
    for place, item in enumerate([] if rest is None else rest.split(",")):
        option, equals, value = (part.strip() for part in item.rpartition("="))
        is_value = not equals and mark == ":" and place == 0
        if not value or not (option or is_value):
            raise ValueError(f"{what} must be {_FORM}, got {text!r}: {item.strip()!r} is no option=value")
        items.append((option, value))
    return name, items


def _value(text: str) -> Any:
    """The whole number, the number, the true or false that a text says; what says none of them stays a text."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.lower(), text)


def _of_kind(option: str, value: Any, annotation: Any) -> Any:
    """The value, if it is of a kind that the option's annotation allows; a whole number is a number, too."""
    allowed = get_args(annotation) or (annotation,)
    if type(value) not in allowed and not (type(value) is int and float in allowed):
        raise refusal(option, " or ".join(text for kind, text in _KINDS.items() if kind in allowed), value)
    return value
