"""Checks arguments: values of Python, NumPy, JAX or PyTorch, with a tuple or an iterator allowed for a list.

Every check takes the name under which the user passed the value. A wrong value raises a ValueError of one line that
gives this name, what is expected, and what came.
"""

import errno
import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol

import numpy as np

from decodax.core.printable import printable

_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = _SHORT.maxdict = 8
_SHORT.maxstring = _SHORT.maxother = 100
_BYTES = bytes | bytearray | memoryview
_NO_LISTS = str | Mapping | _BYTES


def shown(value: Any) -> str:
    """A value of any kind as an error message quotes it: one line, cut short.

    >>> shown([[1, 2], None]), shown(b"x")
    ('[[1, 2], None]', "b'x'")
    """
    try:
        text = _SHORT.repr(value)
    except Exception:  # a class may fail in its own repr, and Python in that of an int of 5,000 digits
        text = f"a value of type {type(value).__name__}"
    return printable(" ".join(text.split()))


def refusal(name: str, expected: str, value: Any, where: str = "") -> ValueError:
    """The error for a value that an argument cannot take.

    name: of the argument.
    expected: what the argument can be.
    value: what came.
    where: ends the message; in which entry the value was found.
    """
    return ValueError(f"{name} must be {expected}, got {shown(value)}{where}")


def plain(value: Any) -> Any:
    """Arrays and scalars of NumPy, JAX or PyTorch, and columns of tables, as Python numbers and lists.

    All else, and what cannot be read (a traced or a deleted array), is returned unchanged.

    >>> plain(np.float32(0.5)), plain(np.arange(3)), plain("text")
    (0.5, [0, 1, 2], 'text')
    """
    if not hasattr(value, "ndim") or isinstance(value, _BYTES | type):
        return value
    try:
        return value.tolist() if hasattr(value, "tolist") else np.asarray(value).tolist()
    except Exception:  # libraries raise different errors; the check refuses the value as it is
        return value


def listed(value: Any) -> list[Any] | None:
    """The entries of a list, a tuple, an array, an iterator; None for texts, bytes, mappings and single things."""
    value = plain(value)
    if isinstance(value, _NO_LISTS) or not isinstance(value, Iterable):
        return None
    if isinstance(value, Iterator):
        return [plain(entry) for entry in value]  # its own errors pass through
    try:
        return [plain(entry) for entry in value]
    except Exception:  # no list after all: an array without axes, or one that is deleted
        return None


def in_order(value: Any) -> list[Any] | None:
    """As `listed`, but None for a set, whose entries have no order."""
    return None if isinstance(value, set | frozenset) else listed(value)


def is_number(value: Any) -> bool:
    """Whether a plain value is a real number; True and False are not."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool | np.complexfloating)


def is_integer(value: Any) -> bool:
    """Whether a plain value is an integer; 3.0, True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether a plain value is a number without a fraction, 3.0 included."""
    return is_integer(value) or (is_number(value) and math.isfinite(value) and value == int(value))


def whole_number(name: str, value: Any, *, least: int, otherwise: str = "") -> int:
    """A whole number of at least `least`.

    name: of the argument.
    value: what came.
    least: the smallest that is allowed.
    otherwise: what else the error names as possible.

    >>> whole_number("max_new_tokens", np.int64(12), least=1), whole_number("max_new_tokens", 12.0, least=1)
    (12, 12)
    """
    number = plain(value)
    if not is_whole(number) or number < least:
        raise refusal(name, f"a whole number, at least {least}{otherwise}", value)
    return int(number)


def share(name: str, value: Any) -> float:
    """A number in 0..1.

    >>> share("threshold", np.float32(0.5)), share("threshold", 1)
    (0.5, 1.0)
    """
    number = plain(value)
    if not is_number(number) or not 0 <= number <= 1:
        raise refusal(name, "a number in 0..1", value)
    return float(number)


def flag(name: str, value: Any) -> bool:
    """True or False, of Python or NumPy."""
    found = plain(value)
    if not isinstance(found, bool):
        raise refusal(name, "True or False", value)
    return found


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """One of the texts in `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise refusal(name, f"one of {', '.join(allowed)}", value)
    return value


def instance(name: str, value: Any, kind: Any, expected: str) -> Any:
    """The value, if it is an instance of a class.

    name: of the argument.
    value: what came.
    kind: the class, or several (`str | Mesh`).
    expected: what the error says of it.
    """
    if not isinstance(value, kind):
        raise refusal(name, expected, value)
    return value


def is_hashable(value: Any) -> bool:
    """Whether the value can be hashed, so that compiled code can be cached for it.

    >>> is_hashable((1, 2)), is_hashable(([1], 2))
    (True, False)
    """
    try:
        hash(value)
    except Exception:  # a class may fail in its own hash
        return False
    return True


def token_ids(name: str, value: Any, vocab_size: int | None = None) -> list[int]:
    """A list of token ids, all inside the vocabulary, if its size is given.

    >>> token_ids("stop_token_ids", (7,)), token_ids("stop_token_ids", np.array([7, 11]), vocab_size=12)
    ([7], [7, 11])
    """
    ids = listed(value)
    if ids is None or not all(map(is_integer, ids)):
        raise refusal(name, "a list of token ids (integers)", value)
    return inside(name, [int(token) for token in ids], vocab_size)


def inside(name: str, ids: list[int], vocab_size: int | None) -> list[int]:
    """The ids, if all of them are in the vocabulary."""
    if vocab_size is not None and any(not 0 <= token < vocab_size for token in ids):
        outside = next(token for token in ids if not 0 <= token < vocab_size)
        raise refusal(name, f"token ids in 0..{vocab_size - 1} (the vocabulary)", outside)
    return ids


def text(name: str, value: Any) -> str:
    """A string without lone surrogates, which Python makes of bytes that are not UTF-8."""
    if not isinstance(value, str):
        raise refusal(name, "text", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be text, and its character {error.start} is the lone surrogate "
            f"{value[error.start]!a}, which is no character: decode the bytes it came from with errors='replace'"
        ) from None
    return str(value)


def strings(name: str, value: Any) -> tuple[str, ...]:
    """One text or several, none of them empty; an empty text alone, like an empty list, gives ().

    >>> strings("stop", "END"), strings("stop", ["a", "b"]), strings("stop", ())
    (('END',), ('a', 'b'), ())
    """
    found = plain(value)
    texts = ([found] if found else []) if isinstance(found, str) else listed(found)
    if texts is None or any(not isinstance(item, str) or not item for item in texts):
        raise refusal(name, "one or more non-empty strings", value)
    return tuple(text(name, item) for item in texts)


def folder_name(name: str, value: Any, otherwise: str = "") -> str | Path:
    """The name of a folder, or of a model on the hub; `otherwise` is what else the error names as possible."""
    found = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(found, str):
        raise refusal(name, f"the path of a folder, as text or pathlib.Path{otherwise}", value)
    try:
        os.lstat(found)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise refusal(name, "a path that this system allows, and it is too long", found) from None
    except ValueError:  # a null character, say
        raise refusal(name, "a path that this system allows", found) from None
    return found if isinstance(value, str) else Path(found)


def require_methods(given: Any, contract: type, what: str) -> None:
    """Raises ValueError, with the names of what is missing, for an object that lacks methods of a contract.

    what: the object's part, for the message.
    """
    asked = {name for base in contract.__mro__ if base not in (Protocol, Generic, object) for name in vars(base)}
    missing = sorted(name for name in asked - {*dir(given)} if not name.startswith("_"))  # no property is evaluated
    if missing:
        raise ValueError(f"{what} {type(given).__name__} lacks {', '.join(missing)} of {contract.__name__}: add them")
