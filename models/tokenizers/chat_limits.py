"""Limits what a chat template may do: the steps of its loops and calls, and the sizes of the values it makes.

A template comes with a model, so it is not trusted. Sizes are checked before Python makes the value, in the operators,
filters and methods that make much of little; a template may still hold many values of the largest size.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

MAX_STEPS = 3_000_000  # a conversation of a thousand messages takes some ten thousand
MAX_CHARACTERS = 2**24
_MAX_ARGUMENT = 2**20  # an integer as an argument: of `center`, `batch` and their like, which make as much
_MAX_BITS = 2**12  # of an integer
_steps: ContextVar[Iterator[int]] = ContextVar("the steps that are left")


class EndlessTemplateError(Exception):
    """A template takes more steps, or makes larger values, than any for a conversation does."""


@contextmanager
def limited_steps() -> Iterator[None]:
    """Lets what runs inside take MAX_STEPS."""
    token = _steps.set(iter(range(MAX_STEPS)))
    try:
        yield
    finally:
        _steps.reset(token)


def next_step() -> None:
    """Counts a step; raises EndlessTemplateError after the last."""
    if next(_steps.get(), None) is None:
        raise EndlessTemplateError(f"more than {MAX_STEPS:,} steps")


def counted(items: Any) -> Iterator[Any]:
    """The same items, each of which is a step."""
    for item in items:
        next_step()
        yield item


def check_size(length: int) -> None:
    """Raises EndlessTemplateError for a text or list that is too long."""
    if length > MAX_CHARACTERS:
        raise EndlessTemplateError(f"a text or list longer than {MAX_CHARACTERS:,}")


def small(argument: Any) -> Any:
    """The same argument; raises EndlessTemplateError for a huge integer."""
    if isinstance(argument, int) and abs(argument) > _MAX_ARGUMENT:
        raise EndlessTemplateError(f"an argument beyond {_MAX_ARGUMENT:,}")
    return argument


def concatenate(texts: Any, separator: Any = "") -> str:
    """The texts with a separator between them, as the operator ~ and the filter `join` make it."""
    parts, between = [str(text) for text in texts], str(separator)
    check_size(sum(map(len, parts)) + len(between) * len(parts))
    return between.join(parts)


def replaced(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    """The text with `old` replaced by `new`, at most `count` times."""
    text, old, new = str(text), str(old), str(new)
    check_size(len(text) + text.count(old) * max(len(new) - len(old), 0))
    return text.replace(old, new, -1 if count is None else count)


def check_format(form: str) -> None:
    """Raises EndlessTemplateError for a format (of % or `format`) with a width of many digits, or an unknown one."""
    if re.search(r"\d{6}|%[-+ #0]*\*|%[^a-zA-Z%]*\.\*|\{[^}]*:[^}]*\{", form):
        raise EndlessTemplateError("a format with a large or unknown width")


def check_call(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Counts a call, and raises EndlessTemplateError where it would make too much."""
    next_step()
    for argument in (*args, *kwargs.values()):
        small(argument)
    function = getattr(function, "__wrapped__", function)  # the sandbox wraps `format`
    text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if not isinstance(text, str):
        return
    if name == "replace" and len(args) > 1:
        replaced(text, *args[:2])
    elif name == "join" and args and isinstance(args[0], list | tuple):
        check_size(sum(len(str(item)) for item in args[0]) + len(text) * len(args[0]))
    elif name in ("format", "format_map"):
        check_format(text)


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Raises EndlessTemplateError where the result of +, *, ** or % would be too large."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _MAX_BITS:
            raise EndlessTemplateError(f"an integer of more than {_MAX_BITS:,} bits")
    elif operator == "+":
        check_size(_length(left) + _length(right))
    elif operator == "*":
        check_size(_length(left) * _times(right) + _length(right) * _times(left))
    elif operator == "%" and isinstance(left, str):
        check_format(left)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _times(value: Any) -> int:
    return max(value, 0) if isinstance(value, int) else 0
