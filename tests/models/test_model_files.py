"""Files of a model folder are found and read only inside permitted folders, and only valid JSON."""

import doctest
import os

import pytest

from decodax.core.printable import printable
from decodax.models.checkpoints import model_files
from decodax.models.checkpoints.model_files import find_file, parse_json_object, read_json_object, stamp


def test_examples():
    assert doctest.testmod(model_files).failed == 0


def test_finds_files_and_links_inside_the_folder(tmp_path):
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("real.json")
    assert find_file(tmp_path, "real.json") == tmp_path / "real.json"
    assert find_file(tmp_path, "link.json") == tmp_path / "link.json"
    assert find_file(tmp_path, "absent.json") is None
    assert find_file(tmp_path / "real.json", "absent.json") is None
    assert find_file(tmp_path, "x" * 100_000) is None


def test_a_snapshot_may_link_to_the_blobs_of_its_repository_only(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    for blobs in (tmp_path / "models--org--name" / "blobs", tmp_path / "models--org--other" / "blobs"):
        blobs.mkdir(parents=True)
        (blobs / "1").write_text("{}")
    snapshot.mkdir(parents=True)
    (snapshot / "own.json").symlink_to("../../blobs/1")
    (snapshot / "other.json").symlink_to("../../../models--org--other/blobs/1")
    assert find_file(snapshot, "own.json") is not None
    with pytest.raises(ValueError, match=r"other\.json is a link to .* outside the model's folder"):
        find_file(snapshot, "other.json")
    (snapshot / "inside").mkdir()
    (snapshot / "inside" / "own.json").symlink_to("../../../blobs/1")
    assert find_file(snapshot / "inside", "own.json") is not None


def test_a_folder_may_link_into_the_cache_of_the_hub(tmp_path, monkeypatch):
    cache, folder = tmp_path / "hub", tmp_path / "model"
    blobs = cache / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    folder.mkdir()
    for target in (blobs / "1", tmp_path / "hub2"):
        target.write_text("{}")
    (folder / "cached.json").symlink_to(blobs / "1")
    (folder / "beside.json").symlink_to(tmp_path / "hub2")
    with pytest.raises(ValueError, match=r"cached\.json is a link to .* outside the model's folder"):
        find_file(folder, "cached.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert find_file(folder, "cached.json") == folder / "cached.json"
    with pytest.raises(ValueError, match=r"beside\.json is a link to .* outside the model's folder"):
        find_file(folder, "beside.json")


def test_the_embedded_model_may_be_installed_as_links(tmp_path, monkeypatch):
    (tmp_path / "store").write_text("{}")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.json").symlink_to(tmp_path / "store")
    with pytest.raises(ValueError, match="outside the model's folder"):
        find_file(tmp_path / "demo", "config.json")
    monkeypatch.setattr(model_files, "_embedded", lambda: tmp_path / "demo")
    assert find_file(tmp_path / "demo", "config.json") is not None


def test_refuses_dangling_and_outside_links_and_special_files(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_text("{}")
    (folder / "gone").symlink_to("../../blobs/0")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "circle").symlink_to("circle")
    (folder / "inside").mkdir()
    os.mkfifo(folder / "pipe")
    for name, words in {
        "gone": "link to .*blobs/0, which is not there",
        "out": "outside the model's folder",
        "circle": "which is not there",
        "inside": "must be a regular file",
        "pipe": "must be a regular file",
    }.items():
        with pytest.raises(ValueError, match=rf"{name} .*{words}|{name}{words}"):
            find_file(folder, name)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "no valid JSON"),
        (b"[1]", "must hold a JSON object, got a list"),
        (b'{"a": }', "no valid JSON"),
        (b'{"a": "\xff"}', "no valid JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 64 levels"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "nested deeper than 64 levels"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no valid JSON: it has a number of 5,000 digits, 9999999999"),
        (b"null", "must hold a JSON object, got null"),
        (b"true", "must hold a JSON object, got true or false"),
    ],
)
def test_refuses_bad_json_objects(tmp_path, content, words):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json.*{words}"):
        read_json_object(tmp_path / "config.json")


def test_reads_objects_up_to_the_limit_of_depth_and_a_byte_order_mark():
    assert parse_json_object(b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}", "x") != {}
    assert parse_json_object(b'\xef\xbb\xbf{"a": 1}', "x") == {"a": 1}


def test_a_duplicate_name_is_refused():
    content = b'{"a": 1, "b": {"c": 2, "c": 3}}'
    assert parse_json_object(content, "x") == {"a": 1, "b": {"c": 3}}
    with pytest.raises(ValueError, match="x is no valid JSON: it has c twice"):
        parse_json_object(content, "x", unique=True)


def test_refuses_json_of_absurd_size(tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "MAX_JSON_BYTES", 10)
    (tmp_path / "config.json").write_text('{"key": "value"}')
    with pytest.raises(ValueError, match=r"config\.json has 16 bytes"):
        read_json_object(tmp_path / "config.json")


def test_control_characters_do_not_reach_a_message():
    assert printable("a\x1b[31m\n\u202e\ud800é") == "a\\x1b[31m\\n\\u202e\\ud800é"
    assert len(printable("x" * 10_000)) == 200


def test_a_long_path_is_cut_in_the_middle():
    for length in (150, 250, 100_000, 10**6):
        found = printable(f"/first/{'x' * length}\n{'y' * length}/config.json")
        assert found.startswith("/first/x") and found.endswith("y/config.json") and len(found) <= 200


def test_the_stamp_of_a_file_changes_with_the_file(tmp_path):
    file = tmp_path / "model.gguf"
    assert stamp(file) is None
    file.write_bytes(b"one")
    before = stamp(file)
    assert before == stamp(str(file)) and before is not None
    file.write_bytes(b"three")
    assert stamp(file) != before and stamp(tmp_path) == stamp(file)
