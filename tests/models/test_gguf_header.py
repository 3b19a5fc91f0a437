"""The header of a GGUF file is read exactly, and a damaged or hostile one is refused in one line."""

import mmap
import random
import struct
import tracemalloc

import numpy as np
import pytest

from decodax.models.checkpoints.gguf.header import read_header
from tests.gguf_files import QUANTISED, TYPE_NUMBERS, gguf_bytes, key_values, text, typed

TENSORS = {
    "a": ("F32", (3, 5), np.arange(15, dtype=np.float32).tobytes()),
    "b": ("F16", (7,), b"\0" * 14),
    "c": ("Q8_0", (2, 64), b"\1" * 2 * 2 * 34),
}
METADATA = {"general.architecture": "llama", "x.size": 7, "x.share": 0.25, "x.flag": True, "x.list": ["a", "bc"]}


def header_of(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with path.open("rb") as stream:
        return read_header(path, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def refused(tmp_path, content, match):
    """Checks that a file is refused in one line that names it."""
    with pytest.raises(ValueError, match=match) as caught:
        header_of(tmp_path, content)
    assert "model.gguf is no GGUF file that can be read: " in str(caught.value) and "\n" not in str(caught.value)


def start(num_tensors, num_keys, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)


def info(name, kind, shape, offset):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [32, 8, 1])
def test_a_header_is_what_was_written(tmp_path, version, alignment):
    more = {} if alignment == 32 else {"general.alignment": alignment}
    metadata = METADATA | more | {"x.numbers": [3, 1, 2], "x.less": -5, "x.none": []}
    content = gguf_bytes(metadata, TENSORS, version=version, alignment=alignment)
    header = header_of(tmp_path, content)
    assert header.metadata == metadata
    assert {name: (found.kind, found.shape) for name, found in header.tensors.items()} == {
        name: (kind, shape) for name, (kind, shape, _) in TENSORS.items()
    }
    for name, found in header.tensors.items():
        assert content[found.start : found.end] == TENSORS[name][2]


@pytest.mark.parametrize("kind,form", [(0, "B"), (1, "b"), (2, "H"), (3, "h"), (10, "Q"), (11, "q"), (12, "d")])
def test_numbers_of_every_size_are_read(tmp_path, kind, form):
    value = -3 if form in "bhq" else 0.1 if form == "d" else 200
    one = struct.pack(f"<{form}", value)
    described = {"one": (kind, one), "three": (9, struct.pack("<IQ", kind, 3) + 3 * one)}
    metadata = header_of(tmp_path, start(0, 2) + key_values(described)).metadata
    assert metadata == {"one": value, "three": [value] * 3} and type(metadata["one"]) is type(value)


def test_every_cut_of_a_header_is_refused(tmp_path):
    content = gguf_bytes(METADATA, TENSORS)
    data = content.index(TENSORS["a"][2])
    for end in [*range(5, data - 31), data + 1]:
        refused(tmp_path, content[:end], "bytes")
    header_of(tmp_path, content[:-20])  # of the padding
    refused(tmp_path, content[:-32], r"it is cut off: it has [\d,]+ bytes, and its tensors end at")


def test_random_bytes_never_raise_anything_else(tmp_path):
    content = gguf_bytes(METADATA, TENSORS)
    generator = random.Random(0)
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(generator.choice((1, 2, 8))):
            changed[generator.randrange(4, len(content) - 300)] = generator.choice(
                (0, 1, 255, generator.randrange(256))
            )
        try:
            header_of(tmp_path, bytes(changed))
        except ValueError as error:
            assert "\n" not in str(error)


HUGE = struct.pack("<Q", 2**62)
LIST = text("x") + struct.pack("<I", 9)
HOSTILE = {
    "another version": (start(0, 0, 1), "its version must be 2 or 3, got 1: convert"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), r"got 50331648 \(its bytes are in big-endian order\)"),
    "many tensors": (start(2**63, 0), "it says that it has 9,223,372,036,854,775,808 tensors, more than its 24 bytes"),
    "many keys": (start(0, 2**40), "it says that it has 1,099,511,627,776 key-values, more than its 24 bytes hold"),
    "long name": (start(0, 1) + HUGE + b"x" * 99, "ends within the name of a key-value: download it again"),
    "long text": (start(0, 1) + text("x") + struct.pack("<I", 8) + HUGE, "ends within x: download"),
    "long array": (
        start(0, 1) + LIST + struct.pack("<I", 4) + HUGE,
        "it has 4,611,686,018,427,387,904 items of x",
    ),
    "nested array": (start(0, 1) + LIST + struct.pack("<IQ", 9, 1) + b"\0" * 99, "x is an array of arrays, which no"),
    "unknown type": (
        start(0, 1) + text("x") + struct.pack("<IQ", 77, 1),
        "x has a value of type 77, which is not known",
    ),
    "unknown items": (start(0, 1) + LIST + struct.pack("<IQ", 77, 1) + b"\0" * 9, "x has a value of type 77"),
    "no UTF-8": (start(0, 1) + text(b"\xff\xfe") + b"\0" * 20, "the name of a key-value is no UTF-8 text"),
    "a key twice": (start(0, 2) + 2 * key_values({"x": typed(1)}), "it has the key x twice"),
    "alignment": (
        gguf_bytes({"general.alignment": 24}, {}),
        "alignment must be a power of two up to .*, got 24",
    ),
    "alignment as text": (gguf_bytes({"general.alignment": "32"}, {}), "general.alignment must be a power of two"),
    "many axes": (start(1, 0) + info("t", 0, (1,) * 5, 0) + b"\0" * 99, "t must have at most 4 axes, got 5"),
    "absurd sizes": (start(1, 0) + info("t", 0, (2**40, 2**40), 0) + b"\0" * 99, "t must have sane sizes"),
    "a tensor twice": (start(2, 0) + info("t", 0, (1,), 0) + info("t", 0, (1,), 32) + b"\0" * 99, "the tensor t twice"),
    "a type not read": (
        start(1, 0) + info("t", TYPE_NUMBERS["IQ2_XXS"], (256,), 0) + b"\0" * 99,
        "t is stored as IQ2_XXS, and what is read is F32, F16, BF16, Q4_0, .*: choose a file with these",
    ),
    "a type not known": (
        start(1, 0) + info("t", 999, (256,), 0) + b"\0" * 99,
        "t is stored as type 999, and what",
    ),
    "half a block": (
        start(1, 0) + info("t", 8, (3, 33), 0) + b"\0" * 999,
        r"t \[3, 33\] is stored as Q8_0, and its",
    ),
    "off the alignment": (start(1, 0) + info("t", 0, (1,), 4) + b"\0" * 99, "t must start at a multiple of 32"),
    "out of the file": (start(1, 0) + info("t", 0, (1,), 2**40) + b"\0" * 99, r"it is cut off: .* \(t is the first"),
    "overlap": (
        start(2, 0) + info("t", 0, (9,), 0) + info("u", 0, (1,), 32) + b"\0" * 99,
        "u overlaps the tensor",
    ),
    "a name for terminals": (start(1, 0) + info("\x1b[31m", 0, (1,), 4) + b"\0" * 99, r"\\x1b\[31m must start"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_in_one_line(case, tmp_path):
    content, match = HOSTILE[case]
    tracemalloc.start()
    try:
        refused(tmp_path, content, match)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_arrays_have_a_limit_together(tmp_path, monkeypatch):
    monkeypatch.setattr("decodax.models.checkpoints.gguf.header._MAX_ITEMS", 5)
    header_of(tmp_path, gguf_bytes({"x": [1, 2, 3], "y": ["a", "b"]}, {}))
    refused(tmp_path, gguf_bytes({"x": [1, 2, 3], "y": ["a", "b", "c"]}, {}), "arrays must have at most 5 items, and y")


def test_a_header_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("decodax.models.checkpoints.gguf.header._MAX_BYTES", 99)
    refused(tmp_path, gguf_bytes({"x": "y" * 200}, {}), "its header must have at most 99 bytes, and x ends after them")


def test_a_file_of_gguf_is_read(tmp_path):
    header = header_of(tmp_path, QUANTISED.read_bytes())
    assert header.metadata["general.architecture"] == "llama" and len(header.tensors) == 20
    assert header.metadata["llama.rope.freq_base"] == 1000.0
    assert header.tensors["blk.1.ffn_down.weight"].kind == "Q6_K"
    assert header.tensors["token_embd.weight"].shape == (263, 32)
