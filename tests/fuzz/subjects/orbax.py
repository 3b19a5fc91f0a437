"""Damages folders with Orbax arrays: metadata, and chunk files that are missing, cut, too long, swapped or no files."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from decodax.models.checkpoints.write_orbax import from_hf
from tests.fuzz.damage import Allowed, Json, byte_damages, text_damages, tree_damages
from tests.fuzz.folders import GOLDEN, check_loads, golden_model
from tests.fuzz.verdict import Case

_BASE = "llama"
_TREE = "tree_metadata"
_ARRAYS = ("blocks_0.mixer.query", "final_norm.weight", "embedding")
_CHUNK = {"blocks_0.mixer.query": "0.0", "final_norm.weight": "0", "embedding": "0.0"}


def cases(work: Path) -> Iterator[Case]:
    folder = _folder(work)
    for file in ("_METADATA", *(f"{name}/.zarray" for name in _ARRAYS[:2])):
        text = (folder / "params" / file).read_bytes()
        value = json.loads(text)
        if file == "_METADATA":  # one array's entry stands for all
            value = value | {_TREE: dict(list(value[_TREE].items())[:3])}
        for damage in tree_damages(value):
            changed = json.dumps(_with_rest(json.loads(text), value, damage.content)).encode()
            yield _case(work, file, damage.kind, changed, _allowed(damage.kind, damage.allowed))
        for damage in text_damages(text):
            yield _case(work, file, damage.kind, damage.content, damage.allowed)
        for damage in byte_damages(text, range(90)):
            yield _case(work, file, f"bytes {damage.kind}", damage.content, Allowed.OTHER)
    yield from _zarray_cases(work, folder)
    for name in _ARRAYS:
        yield from _chunk_cases(work, folder, name)


def _with_rest(complete: Json, reduced: Json, changed: Json) -> Json:
    """The changed metadata of some arrays, with the entries of the arrays that `reduced` leaves out."""
    if not isinstance(changed.get(_TREE), dict) or _TREE not in complete:
        return changed
    rest = {name: entry for name, entry in complete[_TREE].items() if name not in reduced[_TREE]}
    return changed | {_TREE: changed[_TREE] | rest}


def _allowed(kind: str, allowed: Allowed) -> Allowed:
    """Another order or type of the same bytes is another model; all else must be detected."""
    return Allowed.OTHER if kind.endswith((":order", ":dtype")) else allowed


def _zarray_cases(work: Path, folder: Path) -> Iterator[Case]:
    """Damage beyond single values: sizes that fit each other and nothing else."""
    file = f"{_ARRAYS[0]}/.zarray"
    value = json.loads((folder / "params" / file).read_bytes())
    changes: dict[str, dict[str, Any]] = {
        "huge chunks": {"chunks": [2**40, 1]},
        "huge everything": {"chunks": [2**40, 2**20], "shape": [2**40, 2**20]},
        "tiny chunks": {"chunks": [1, 1]},
        "huge shape": {"shape": [2**62, 30]},
        "whole numbers": {"dtype": "<i4"},
        "other bytes": {"dtype": ">f4"},
        "eight bytes": {"dtype": "<f8"},
        "zlib": {"compressor": {"id": "zlib", "level": 1}},
        "blosc": {"compressor": {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1}},
        "unknown compressor": {"compressor": {"id": "\x1b[2J"}},
        "fill value": {"fill_value": 1.0},
        "NaN fill value": {"fill_value": "NaN"},
        "separator": {"dimension_separator": "/"},
        "filters": {"filters": [{"id": "delta"}]},
    }
    for kind, change in changes.items():
        allowed = Allowed.OTHER if kind == "other bytes" else Allowed.SAME
        yield _case(work, file, kind, json.dumps(value | change).encode(), allowed, may_kill=True)


def _chunk_cases(work: Path, folder: Path, name: str) -> Iterator[Case]:
    file = f"{name}/{_CHUNK[name]}"
    content = (folder / "params" / file).read_bytes()
    for kind, changed in {"empty": b"", "short": content[:-4], "long": content + bytes(4), "odd": content[:-1]}.items():
        yield _case(work, file, kind, changed, Allowed.NOTHING)
    for damage in byte_damages(content, range(24)):
        is_as_long = len(damage.content) == len(content)
        yield _case(
            work, file, f"bytes {damage.kind}", damage.content, Allowed.OTHER if is_as_long else Allowed.NOTHING
        )
    for kind, make in _NO_FILES.items():
        yield Case(
            f"orbax/{_BASE}/{file} {kind}",
            partial(_load, work, file, make, Allowed.NOTHING),
            _named(file),
            may_kill=True,
        )
    yield Case(f"orbax/{_BASE}/{name} lost", partial(_load, work, name, shutil.rmtree, Allowed.NOTHING), _named(file))


_NO_FILES: dict[str, Callable[[Path], Any]] = {
    "lost": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "link out": lambda path: (path.unlink(), path.symlink_to("/etc/hostname")),
    "link to nothing": lambda path: (path.unlink(), path.symlink_to("gone")),
    "device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "sparse": lambda path: os.truncate(path, 2**40),
}


def _named(file: str) -> tuple[tuple[str, ...], ...]:
    return ((file.split("/")[0], "params", "decodax.json", "orbax-damaged do not fit its config.json"),)


def _case(work: Path, file: str, kind: str, content: bytes, allowed: Allowed, *, may_kill: bool = False) -> Case:
    may_kill = may_kill or file.endswith(".zarray")  # read in C++
    act = partial(_load, work, file, lambda path: path.write_bytes(content), allowed)
    return Case(
        f"orbax/{_BASE}/{file} {kind}", act, _named(file), may_kill=may_kill, given=content[:100_000] + _names(work)
    )


def _names(work: Path) -> bytes:
    """The names of the arrays and the undamaged metadata, which a message may quote."""
    params = _folder(work) / "params"
    return " ".join(path.name for path in params.iterdir()).encode() + (params / "_METADATA").read_bytes()


def _folder(work: Path) -> Path:
    folder = work / "orbax"
    if not folder.exists():
        from_hf(GOLDEN / _BASE, folder)
    return folder


def _load(work: Path, file: str, make: Callable[[Path], Any], allowed: Allowed) -> None:
    damaged = work / "orbax-damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(_folder(work), damaged)
    make(damaged / "params" / file)
    check_loads(damaged, golden_model(_BASE), allowed)
