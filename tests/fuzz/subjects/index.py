"""Damages model.safetensors.index.json: its text, names that lead elsewhere, and shards that contradict it."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.fuzz.damage import Allowed, byte_damages, text_damages, tree_damages
from tests.fuzz.folders import GOLDEN, WEIGHTS, check_loads, config_of, golden_model, packed, tensors_of
from tests.fuzz.verdict import Case

_BASE, _INDEX = "llama", "model.safetensors.index.json"
_SHARDS = tuple(f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3))
Tensors = dict[str, tuple[str, list[int], bytes]]


def cases(work: Path) -> Iterator[Case]:
    shards = _shards()
    index = _index_of(shards)
    text = json.dumps(index, indent=1).encode()
    yield _case(work, "undamaged", text, shards, Allowed.HARMLESS)
    for damage in (*tree_damages(index), *text_damages(text)):
        yield _case(work, damage.kind, _bytes(damage.content), shards, damage.allowed)
    for damage in byte_damages(text, range(240)):
        yield _case(work, f"bytes {damage.kind}", damage.content, shards)
    first, second = _SHARDS[:2]
    name = next(iter(shards[first]))
    for place in (
        "../out.safetensors",
        "/etc/hostname",
        "",
        ".",
        "..",
        "a/b.safetensors",
        "\x1b[2J.safetensors",
        "x" * 5_000,
    ):
        changed = index | {"weight_map": index["weight_map"] | {name: place}}
        kind = place[:24].encode("unicode_escape").decode()
        yield _case(work, f"names {kind!r}", _bytes(changed), shards, Allowed.NOTHING)
    other = shards[first][name]
    different = (other[0], other[1], bytes(len(other[2])))
    for kind, tensor, allowed in (("twice alike", other, Allowed.SAME), ("twice", different, Allowed.NOTHING)):
        yield _case(work, kind, text, shards | {second: shards[second] | {name: tensor}}, allowed)
    for file in _SHARDS:
        rest = {other: shards[other] for other in _SHARDS if other != file}
        yield _case(work, f"without {file}", text, rest, Allowed.NOTHING)
        yield _case(work, f"empty {file}", text, shards | {file: {}}, Allowed.NOTHING)
    swapped = shards | {first: shards[second], second: shards[first]}
    yield _case(work, "shards exchanged", text, swapped)


def _shards() -> dict[str, Tensors]:
    tensors = list(tensors_of((GOLDEN / _BASE / WEIGHTS).read_bytes()).items())
    third = -(-len(tensors) // 3)
    return {name: dict(tensors[third * index : third * (index + 1)]) for index, name in enumerate(_SHARDS)}


def _index_of(shards: Mapping[str, Tensors]) -> dict[str, Any]:
    size = sum(len(numbers) for tensors in shards.values() for _, _, numbers in tensors.values())
    names = {name: file for file, tensors in shards.items() for name in tensors}
    return {"metadata": {"total_size": size}, "weight_map": names}


def _bytes(content: Any) -> bytes:
    return content if isinstance(content, bytes) else json.dumps(content).encode()


def _case(work: Path, kind: str, index: bytes, shards: Mapping[str, Tensors], allowed: Allowed = Allowed.SAME) -> Case:
    named = ((_INDEX, *_SHARDS, "sharded"),)
    return Case(f"index/{_BASE}/{kind}", partial(_load, work, index, shards, allowed), named, given=index)


def _load(work: Path, index: bytes, shards: Mapping[str, Tensors], allowed: Allowed) -> None:
    folder = work / "sharded"
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    (folder / "config.json").write_text(json.dumps(config_of(_BASE)))
    (folder / _INDEX).write_bytes(index)
    for name, tensors in shards.items():
        (folder / name).write_bytes(packed(tensors))
    (work / "out.safetensors").write_bytes(packed(shards.get(_SHARDS[0], {})))
    check_loads(folder, golden_model(_BASE), allowed)
