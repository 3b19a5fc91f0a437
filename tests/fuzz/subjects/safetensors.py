"""Damages model.safetensors: the header's JSON, sizes and names, and the bytes, of plain and packed weights."""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.damage import Allowed, Damage, byte_damages, tree_damages
from tests.fuzz.folders import (
    WEIGHTS,
    check_loads,
    copy_of,
    golden_model,
    packed,
    read_safetensors,
    tensors_of,
    write_safetensors,
)
from tests.fuzz.verdict import Case

_BASES = ("llama", "gpt_oss_mxfp4", "deepseek_v3_fp8", "llama_tied")
# Types of other sizes than F32's four bytes, of the same size, and an unknown one.
_KINDS = ("F64", "F16", "BF16", "I32", "U32", "I64", "BOOL", "F8_E4M3", "F4", "C64", "f32", "", "F32\x1b[2J")


def cases(work: Path) -> Iterator[Case]:
    for base in _BASES:
        content = (copy_of(base, work) / WEIGHTS).read_bytes()
        for damage in (*_files(content), *_headers(content), *_tensors(content)):
            name = f"safetensors/{base}/{damage.kind}"
            # The names that a message quotes are in the header, which comes first.
            given = damage.content[: 2 * len(content)]
            yield Case(
                name, partial(_load, work, base, damage.content, damage.allowed), ((WEIGHTS, base),), given=given
            )
    for kind, make in _NO_FILES.items():
        yield Case(f"safetensors/llama/{kind}", partial(_load_odd, work, "llama", make), ((WEIGHTS,),), may_kill=True)


def _files(content: bytes) -> Iterator[Damage]:
    header_size = int.from_bytes(content[:8], "little")
    for seed in range(120):  # in the header, where bytes have a meaning
        for damage in byte_damages(content[: 8 + header_size], range(seed, seed + 1)):
            yield Damage(f"header {damage.kind}", damage.content + content[8 + header_size :])
    for damage in byte_damages(content, range(120)):  # mostly in the numbers
        yield Damage(f"bytes {damage.kind}", damage.content, Allowed.OTHER)
    for kind, size in {"0": 0, "1": 1, "more": header_size + 1, "less": header_size - 1, "2^32": 2**32}.items():
        yield Damage(f"header size:{kind}", size.to_bytes(8, "little") + content[8:])
    yield Damage("header size:2^64", b"\xff" * 8 + content[8:], Allowed.NOTHING)
    yield Damage("trailing bytes", content + b"abc")
    yield Damage("nothing", b"", Allowed.NOTHING)
    yield Damage("only a header", content[: 8 + header_size], Allowed.NOTHING)


def _headers(content: bytes) -> Iterator[Damage]:
    header, data = read_safetensors(content)
    names = [name for name in header if name != "__metadata__"]
    for name in (names[0], names[-1]):
        for damage in tree_damages(header[name]):
            yield Damage(f"entry {damage.kind}:{name}", write_safetensors(header | {name: damage.content}, data))
        for kind in _KINDS:
            entry = header[name] | {"dtype": kind}
            yield Damage(f"dtype {kind!r}:{name}", write_safetensors(header | {name: entry}, data))
        right = header[name]["shape"]
        others = ([], [*right, 1], [1, *right], right[::-1], [int(np.prod(right))], [2**62, 4], [-1, *right[1:]])
        for shape in [list(one) for one in dict.fromkeys(map(tuple, others)) if list(one) != right]:
            entry = header[name] | {"shape": shape}
            yield Damage(f"shape {shape}:{name}", write_safetensors(header | {name: entry}, data))
    first, second = header[names[0]], header[names[1]]
    overlapping = header | {names[1]: second | {"data_offsets": first["data_offsets"]}}
    yield Damage("overlap", write_safetensors(overlapping, data), Allowed.NOTHING)
    for index, metadata in enumerate((None, 7, [], {"format": 1}, {"a": {"b": "c"}}, {"\x1b[2J": "x"}, {})):
        yield Damage(f"metadata:{index}", write_safetensors(header | {"__metadata__": metadata}, data))
    text = json.dumps(header).encode()
    yield Damage("header twice", write_safetensors(text[:-1] + b"," + text[1:], data))
    yield Damage("padded header", write_safetensors(text + b" " * 800, data), Allowed.HARMLESS)
    yield Damage("reordered header", write_safetensors(dict(reversed(header.items())), data), Allowed.HARMLESS)
    deep = text[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    yield Damage("nested header", write_safetensors(deep, data), Allowed.NOTHING)
    yield Damage("header is a list", write_safetensors(b"[]", data), Allowed.NOTHING)


def _tensors(content: bytes) -> Iterator[Damage]:
    tensors = tensors_of(content)
    yield Damage("moved", packed(dict(reversed(tensors.items()))), Allowed.HARMLESS)
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        yield Damage(f"without:{name}", packed(rest), Allowed.NOTHING)
        yield Damage(f"renamed:{name}", packed(rest | {f"x.{name}": tensors[name]}), Allowed.NOTHING)
    first = next(iter(tensors))
    for extra in ("\x1b[2Jred\n", "x" * 100_000, "", "model.layers.0.zzz", "..", "lora_A.weight"):
        kind = extra[:12].encode("unicode_escape").decode()
        yield Damage(f"surplus:{kind}", packed(tensors | {extra: tensors[first]}))
    many = {f"surplus.{index}": ("F32", [1], bytes(4)) for index in range(5_000)}
    yield Damage("surplus:5000 tensors", packed(tensors | many), Allowed.NOTHING)


def _load(work: Path, base: str, content: bytes, allowed: Allowed) -> None:
    folder = copy_of(base, work)
    right = (folder / WEIGHTS).read_bytes()
    try:
        # Anew, because the file may still be mapped.
        _replace(folder / WEIGHTS, lambda path: path.write_bytes(content))
        check_loads(folder, golden_model(base), allowed)
    finally:
        _replace(folder / WEIGHTS, lambda path: path.write_bytes(right))


def _replace(path: Path, make: Callable[[Path], Any]) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    make(path)


_NO_FILES: dict[str, Callable[[Path], Any]] = {
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link out": lambda path: path.symlink_to("/etc/hostname"),
    "link to nothing": lambda path: path.symlink_to("gone"),
    "sparse": lambda path: (path.write_bytes(b"\x10" + bytes(7) + b"{" + b" " * 15), os.truncate(path, 2**42)),
}


def _load_odd(work: Path, base: str, make: Callable[[Path], Any]) -> None:
    folder = copy_of(base, work)
    right = (folder / WEIGHTS).read_bytes()
    try:
        _replace(folder / WEIGHTS, make)
        check_loads(folder, golden_model(base), Allowed.NOTHING)
    finally:
        _replace(folder / WEIGHTS, lambda path: path.write_bytes(right))
