"""Headers of safetensors files must describe every byte exactly once, or are refused by file and tensor."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from decodax.models.checkpoints import file_header
from decodax.models.checkpoints.file_header import HeaderEntry, read_header


def entry(kind="F32", shape=(3,), offsets=(0, 12)):
    return {"dtype": kind, "shape": list(shape), "data_offsets": list(offsets)}


def write(path, header, num_bytes=12):
    """A file with this header, given as JSON text or as an object, and `num_bytes` bytes after it."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def test_files_of_the_safetensors_library_pass(file):
    save_file({"b": np.ones((2, 3), np.float16), "a": np.ones((5, 0), np.int8)}, file, {"format": "pt"})
    header = read_header(file)
    assert header.entries == {"b": HeaderEntry("F16", (2, 3), 0, 12), "a": HeaderEntry("I8", (5, 0), 12, 12)} or (
        header.entries == {"a": HeaderEntry("I8", (5, 0), 0, 0), "b": HeaderEntry("F16", (2, 3), 0, 12)}
    )
    assert header.num_bytes + 12 == file.stat().st_size


def test_tensors_in_any_order_and_of_unknown_dtypes(file):
    header = read_header(write(file, {"y": entry("NEW_9", (7,), (5, 12)), "x": entry("U8", (5,), (0, 5))}))
    assert list(header.entries) == ["x", "y"] and header.entries["y"].kind == "NEW_9"
    assert read_header(write(file, {"half": entry("F4", (6,), (0, 3))}, 3)).entries["half"].end == 3


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"x": entry(offsets=(0, 11))}, r"expected \d+ bytes|does not fill its 11 bytes"),
        ({"x": entry(shape=(4,))}, r"x is F32 \[4\], and that does not fill its 12 bytes"),
        ({"x": entry(shape=(2**40, 0))}, "does not fill its 12 bytes"),
        ({"x": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}, "sane sizes"),
        ({"x": entry(shape=(1,) * 40)}, "at most 32 sane sizes"),
        ({"x": entry(shape=(-3, -1))}, "sane sizes"),
        ({"x": entry(shape=(3.0,))}, "sane sizes"),
        ({"x": entry(shape=(True, 3))}, "sane sizes"),
        ({"x": {**entry(), "shape": 3}}, "sane sizes"),
        ({"x": entry(offsets=(12, 0))}, "data_offsets"),
        ({"x": entry(offsets=(0, 12, 12))}, "data_offsets"),
        ({"x": entry(offsets=("0", "12"))}, "data_offsets"),
        ({"x": {"dtype": "F32"}}, "sane sizes, got None"),
        ({"x": {**entry(), "dtype": ["F32"]}}, "x must have dtype, shape and data_offsets"),
        ({"x": None}, "x must have dtype, shape and data_offsets"),
        ({"x": entry(shape=(1,), offsets=(0, 4)), "y": entry(shape=(1,), offsets=(8, 12))}, "y follows bytes that"),
        ({"x": entry(shape=(2,), offsets=(0, 8)), "y": entry(shape=(2,), offsets=(4, 12))}, "y overlaps the tensor"),
        ({"x\x1b[2J": entry(shape=(4,))}, r"x\\x1b\[2J is F32"),
        (f'{{"x": {json.dumps(entry())}, "x": {json.dumps(entry())}}}', "it has x twice"),
        ("{" + '"a":{' * 100_000, "nested deeper|no valid JSON"),
        ('{"a":' * 99 + "1" + "}" * 99, "nested deeper"),
        ("[]", "must hold a JSON object"),
        ("", "no valid JSON"),
    ],
)
def test_headers_that_do_not_describe_the_file_are_refused(file, header, words):
    with pytest.raises(ValueError, match=rf"model\.safetensors is no intact safetensors file.*({words})") as caught:
        read_header(write(file, header))
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_absurd_lengths(file, monkeypatch):
    for content in (b"", b"1234567", b"\xff" * 8, b"\xff" * 80, (73).to_bytes(8, "little") + b"{}"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"it has {len(content)} bytes, too few for its header"):
            read_header(file)
    monkeypatch.setattr(file_header, "MAX_HEADER_BYTES", 30)
    with pytest.raises(ValueError, match="too few for its header"):
        read_header(write(file, {"x": entry()}))


def test_a_git_lfs_pointer_in_place_of_the_file(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n")
    with pytest.raises(ValueError, match=r"pointer that Git LFS leaves in its place: run `git lfs pull` there"):
        read_header(file)


@pytest.mark.parametrize("extra", [-1, 1, 1000])
def test_more_or_fewer_bytes_than_the_tensors_have(file, extra):
    write(file, {"x": entry()}, 12 + extra)
    size = file.stat().st_size
    with pytest.raises(ValueError, match=rf"expected {size - extra} bytes, it has {size}"):
        read_header(file)
