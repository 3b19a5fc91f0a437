"""Damages file contents: JSON values, JSON texts and bytes. Pure functions; random damage is drawn from a seed.

A `Damage` says what was done, the damaged content, and which outcomes are allowed. Subjects (`tests/fuzz/subjects`)
put it in place of the model's file.
"""

import copy
import enum
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Json = Any
Path = tuple[str | int, ...]  # the keys and indices that lead to a value


class Allowed(enum.Enum):
    """Outcomes that a damaged file may have, besides a refusal with a clear message.

    HARMLESS: nothing was damaged; it must load, unchanged.
    SAME: it may load, unchanged.
    OTHER: it may load as another model, because it describes another one.
    NOTHING: it must be refused.
    """

    HARMLESS = "harmless"
    SAME = "same"
    OTHER = "other"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Damage:
    """One damage.

    kind: what was done, with all that is needed to repeat it.
    content: the damaged content."""

    kind: str
    content: Any
    allowed: Allowed = Allowed.SAME


def huge_numbers(value: float) -> dict[str, Json]:
    """Values in place of a number that was typed or written far too large."""
    whole: dict[str, Json] = {"1e6": 10**6, "1e9": 10**9, "2^63": 2**63, "1e40": 10**40, "400 digits": 10**400}
    return whole if isinstance(value, int) else whole | {"1e300": 1e300, "infinity": float("inf"), "nan": float("nan")}


def retyped(value: Json) -> dict[str, Json]:
    """The same value in other JSON types, and values of unexpected types."""
    as_text = value if isinstance(value, str) else json.dumps(value)
    forms: dict[str, Json] = {"list": [value], "object": {"value": value}, "empty object": {}, "empty list": []}
    if isinstance(value, str):
        return forms | {"number": 7, "boolean": True, "empty text": "", "control text": value + "\x1b[2J\n"}
    forms["text"] = as_text
    if isinstance(value, bool):
        return forms | {"number": int(value), "null text": "null"}
    if isinstance(value, int):
        return forms | {"fraction": value + 0.5, "float": float(value), "boolean": True}
    if isinstance(value, float):
        return forms | {"boolean": True, "words": "about one"}
    return forms | {"number": 7, "true": True, "false": False, "zero": 0}


def field_damages(value: Json) -> Iterator[Damage]:
    """Every damage of one field's value but dropping it: null, other types, negated, zero, huge."""
    if value is not None:
        yield Damage("null", None)
    for kind, new in retyped(value).items():
        yield Damage(f"retype:{kind}", new)
    if isinstance(value, bool):
        yield Damage("negate", not value, Allowed.OTHER)
    elif isinstance(value, int | float):
        yield Damage("negate", -value)
        yield Damage("zero", 0)
        for kind, new in huge_numbers(value).items():
            yield Damage(f"huge:{kind}", new)
    elif isinstance(value, str):
        yield Damage("huge:text", value * (1 + 100_000 // max(len(value), 1)))
    elif isinstance(value, list):
        yield Damage("short", value[:-1])
        yield Damage("long", [*value, *value])
        yield Damage("huge:list", value * 10_000)


def paths(value: Json, prefix: Path = ()) -> Iterator[Path]:
    """The path of every value within a JSON value, without itself."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*prefix, key)
        yield from paths(child, (*prefix, key))


def at(value: Json, path: Path) -> Json:
    """The value at a path."""
    for key in path:
        value = value[key]
    return value


def replaced(value: Json, path: Path, new: Json) -> Json:
    """A copy with `new` at a path."""
    if not path:
        return new
    changed = copy.copy(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed


def dropped(value: Json, path: Path) -> Json:
    """A copy without the value at a path."""
    *parents, last = path
    parent = copy.copy(at(value, tuple(parents)))
    del parent[last]
    return replaced(value, tuple(parents), parent)


_MANY = 24  # entries of an object that are not a record but a collection, like a vocabulary


def tree_damages(value: Json) -> Iterator[Damage]:
    """Every damage of every value within a JSON value, one at a time; of a list or a collection only at both ends."""
    for path in paths(value):
        if any(_is_amid(at(value, path[:index]), key) for index, key in enumerate(path)):
            continue
        where = "/".join(map(str, path))
        yield Damage(f"drop:{where}", dropped(value, path))
        for damage in field_damages(at(value, path)):
            yield Damage(f"{damage.kind}:{where}", replaced(value, path, damage.content), damage.allowed)


def _is_amid(parent: Json, key: str | int) -> bool:
    """Whether an entry has others like it on both sides."""
    if isinstance(parent, list):
        return 2 <= int(key) < len(parent) - 1
    return len(parent) > _MANY and key not in (*list(parent)[:2], *list(parent)[-1:])


def text_damages(content: bytes) -> Iterator[Damage]:
    """Damages of a whole file that holds a JSON object, whatever its content."""
    yield Damage("byte order mark", b"\xef\xbb\xbf" + content)
    yield Damage("spaces", b" \n\t" + content + b"\r\n ", Allowed.HARMLESS)
    yield Damage("empty", b"", Allowed.NOTHING)
    yield Damage("cut in half", content[: len(content) // 2], Allowed.NOTHING)
    yield Damage("without end", content.rstrip()[:-1], Allowed.NOTHING)
    yield Damage("rest behind", content + b"x", Allowed.NOTHING)
    yield Damage("zeros", bytes(len(content)), Allowed.NOTHING)
    yield Damage("zero behind", content + b"\0", Allowed.NOTHING)
    yield Damage("UTF-16", content.decode().encode("utf-16"), Allowed.NOTHING)
    yield Damage("not UTF-8", content.rstrip()[:-1] + b', "\xff": 1}', Allowed.NOTHING)
    for kind, text in {"null": b"null", "list": b"[]", "number": b"7", "text": b'"x"', "true": b"true"}.items():
        yield Damage(f"only {kind}", text, Allowed.NOTHING)
    for depth in (100, 1_000, 100_000):
        nested = b"[" * depth + b"]" * depth
        yield Damage(f"nested {depth}", content.rstrip()[:-1] + b', "deep": ' + nested + b"}", Allowed.NOTHING)
    yield Damage("5000 digits", content.rstrip()[:-1] + b', "digits": ' + b"9" * 5_000 + b"}", Allowed.NOTHING)


def byte_damages(content: bytes, seeds: range) -> Iterator[Damage]:
    """One random damage of the bytes for each seed: bits turned, bytes lost, repeated, exchanged or set to zero."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        kind = ("bits", "cut", "lost", "repeated", "zeroed", "random")[seed % 6]
        yield Damage(f"{kind}:{seed}", _DAMAGE_BYTES[kind](content, rng))


def _bits(content: bytes, rng: np.random.Generator) -> bytes:
    damaged = bytearray(content)
    for place in rng.integers(0, len(content), rng.integers(1, 4)):
        damaged[place] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def _run(content: bytes, rng: np.random.Generator) -> tuple[int, int]:
    start = int(rng.integers(0, len(content)))
    return start, min(start + int(rng.integers(1, 40)), len(content))


def _lost(content: bytes, rng: np.random.Generator) -> bytes:
    start, end = _run(content, rng)
    return content[:start] + content[end:]


def _repeated(content: bytes, rng: np.random.Generator) -> bytes:
    start, end = _run(content, rng)
    return content[:end] + content[start:]


def _zeroed(content: bytes, rng: np.random.Generator) -> bytes:
    start, end = _run(content, rng)
    return content[:start] + bytes(end - start) + content[end:]


def _random(content: bytes, rng: np.random.Generator) -> bytes:
    start, end = _run(content, rng)
    return content[:start] + rng.bytes(end - start) + content[end:]


_DAMAGE_BYTES = {
    "bits": _bits,
    "cut": lambda content, rng: content[: int(rng.integers(0, len(content)))],
    "lost": _lost,
    "repeated": _repeated,
    "zeroed": _zeroed,
    "random": _random,
}
