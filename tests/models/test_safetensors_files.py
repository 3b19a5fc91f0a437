"""Weights in one file or several: the index, the files and their tensors must agree, inside the folder."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from decodax.models.checkpoints import safetensors_files
from decodax.models.checkpoints.safetensors_files import INDEX_FILE, open_weights, weight_files

A, B = "a.safetensors", "b.safetensors"
ONE, TWO = np.arange(3, dtype=np.float32), np.arange(5, dtype=np.float32)


def write_index(folder, weight_map):
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path):
    """Two files and their index: "one" in A, "two" in B."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"one": ONE}, folder / A)
    save_file({"two": TWO}, folder / B)
    write_index(folder, {"one": A, "two": B})
    return folder


def test_shards(folder):
    assert weight_files(folder) == [folder / A, folder / B]
    stored = open_weights(folder)
    np.testing.assert_array_equal(stored["two"].array(np.float32), TWO)
    assert list(stored) == ["one", "two"]


def test_a_tensor_in_two_files(folder):
    save_file({"two": TWO, "one": ONE}, folder / B)
    assert set(open_weights(folder)) == {"one", "two"}  # the same numbers twice
    for other in (ONE + 1, ONE.astype(np.float64), ONE[None], np.float32([0, 1, np.nan])):
        save_file({"two": TWO, "one": other}, folder / B)
        with pytest.raises(ValueError, match=rf"one is in {A} and in {B} with different content"):
            open_weights(folder)


def test_every_byte_of_a_tensor_in_two_files_is_compared(folder, monkeypatch):
    monkeypatch.setattr(safetensors_files, "_COMPARED_BYTES", 5)  # 12 bytes in three pieces
    for byte in range(ONE.nbytes):
        content = bytearray(ONE.tobytes())
        content[byte] ^= 1
        save_file({"two": TWO, "one": np.frombuffer(bytes(content), ONE.dtype)}, folder / B)
        with pytest.raises(ValueError, match="with different content"):
            open_weights(folder)
    save_file({"two": TWO, "one": ONE}, folder / B)
    assert set(open_weights(folder)) == {"one", "two"}


def test_tensors_that_are_not_where_the_index_says(folder):
    write_index(folder, {"one": B, "two": B})
    with pytest.raises(ValueError, match=rf"index.json places one in {B}, and no file holds it: download"):
        open_weights(folder)
    write_index(folder, {"one": B, "two": A})
    with pytest.raises(ValueError, match=rf"places one in {B}, and {A} holds it \(and 1 more that are not where"):
        open_weights(folder)
    write_index(folder, {"two": B, "\x1b[2Jthree": A})
    with pytest.raises(ValueError, match=rf"places \\x1b\[2Jthree in {A}, and no file holds it"):
        open_weights(folder)
    write_index(folder, {"two": B})  # a file may hold more than the index says, and may not be named at all
    assert set(open_weights(folder)) == {"two"}


@pytest.mark.parametrize(
    "name",
    [
        *("../a.safetensors", "/a.safetensors", "sub/a.safetensors", "..\\a.safetensors", "C:a.safetensors"),
        *("a.bin", "a", "", ".safetensors", "..", "a\0.safetensors", 3, None, ["a.safetensors"], {}),
    ],
)
def test_an_index_names_plain_files(folder, name):
    save_file({"one": ONE}, folder.parent / A)
    write_index(folder, {"one": name, "two": B})
    with pytest.raises(
        ValueError, match=r"index.json must name files in its own folder that end in .safetensors .* one"
    ):
        open_weights(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"a":' * 100_000])
def test_bad_indexes_are_refused(folder, content):
    (folder / INDEX_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json"):
        open_weights(folder)


def test_files_that_are_missing_are_counted(folder):
    write_index(folder, {f"x{i}": f"x{i}.safetensors" for i in range(7)} | {"one": A})
    with pytest.raises(
        FileNotFoundError, match=r"not in .*: x0.safetensors, x1.safetensors, x2.safetensors and 4 more"
    ):
        open_weights(folder)


@pytest.mark.parametrize("name", [A, "model.safetensors", INDEX_FILE])
def test_links_and_special_files_are_refused(folder, name):
    path, target = folder / name, folder.parent / "elsewhere"
    path.unlink(missing_ok=True)
    path.symlink_to("../../blobs/0")
    with pytest.raises(ValueError, match=rf"{name} is a link to ../../blobs/0, which is not there"):
        open_weights(folder)
    path.unlink()
    save_file({"one": ONE}, target)
    path.symlink_to(target)
    with pytest.raises(ValueError, match=rf"{name} is a link to .*elsewhere, outside the model's folder"):
        open_weights(folder)
    path.unlink()
    os.mkfifo(path)  # opening it would wait for ever
    with pytest.raises(ValueError, match=rf"{name} must be a regular file"):
        open_weights(folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=rf"{name} must be a regular file"):
        open_weights(folder)
