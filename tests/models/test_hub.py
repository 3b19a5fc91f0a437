"""A copy in the hub's cache is used if it holds what loading needs, else the error says what is there; no network."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from decodax.models.checkpoints.hub import download
from decodax.models.checkpoints.safetensors_files import open_weights
from decodax.models.load import find_folder
from tests.golden_files import load_golden

LLAMA = load_golden("llama").folder
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """An empty cached repository of the model org/name, without access to the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    for folder in ("refs", "blobs", "snapshots/abc"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    return repository


def add(repository, name, content):
    """A file of the snapshot, as a link to its blob."""
    blob = repository / "blobs" / f"blob-of-{name}"
    blob.write_bytes(content)
    (repository / "snapshots" / "abc" / name).symlink_to(f"../../blobs/{blob.name}")


def add_model(repository, *names):
    for name in names:
        add(repository, name, (LLAMA / name).read_bytes())


def add_shards(repository, *shards):
    tensors = load_file(LLAMA / "model.safetensors")
    halves = dict(zip(SHARDS, np.array_split(sorted(tensors), 2), strict=True))
    weight_map = {str(name): shard for shard, names in halves.items() for name in names}
    add(repository, "model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())
    for shard in shards:
        blob = repository / "blobs" / shard
        save_file({str(name): tensors[name] for name in halves[shard]}, blob)
        (repository / "snapshots" / "abc" / shard).symlink_to(f"../../blobs/{shard}")


def test_a_complete_copy_without_a_tokenizer(repository):
    add_model(repository, "config.json", "model.safetensors")
    assert find_folder("org/name") == repository / "snapshots" / "abc"


def test_shards(repository):
    add_model(repository, "config.json")
    add_shards(repository, *SHARDS)
    folder = find_folder("org/name")
    assert folder == repository / "snapshots" / "abc"
    assert set(open_weights(folder)) == set(load_file(LLAMA / "model.safetensors"))  # through the links to the blobs


@pytest.mark.parametrize("listed", [False, True])  # newer versions of the hub's library list the files
def test_present_and_missing_files_are_named(repository, monkeypatch, listed):
    add_model(repository, "config.json")
    add_shards(repository, SHARDS[1])
    (repository / "blobs" / "x.incomplete").write_bytes(b"")
    if listed:
        from huggingface_hub import errors

        def incomplete(*args, **options):
            raise errors.LocalEntryNotFoundError("incomplete")

        monkeypatch.setattr("huggingface_hub.snapshot_download", incomplete)
    with pytest.raises(ConnectionError) as caught:
        download("org/name")
    for words in (
        f"missing are {SHARDS[0]}; there are config.json, {SHARDS[1]}, model.safetensors.index.json in ",
        "out of reach (offline?)",
        "a download was interrupted",
    ):
        assert words in str(caught.value)


def test_a_listed_file_that_loading_does_not_need_may_be_missing(repository, monkeypatch):
    from huggingface_hub import errors

    def incomplete(*args, **options):
        raise errors.LocalEntryNotFoundError("training_args.json is missing")

    monkeypatch.setattr("huggingface_hub.snapshot_download", incomplete)
    add_model(repository, "config.json", "model.safetensors")
    assert download("org/name") == repository / "snapshots" / "abc"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            ("config.json",),
            r"missing are model\.safetensors \(or .*index\.json and its files\); there are config\.json in",
        ),
        (("model.safetensors",), r"missing are config\.json; there are model\.safetensors in"),
        ((), r"missing are config\.json, model\.safetensors .*; there are no files in"),
    ],
)
def test_config_or_weights_alone(repository, files, words):
    add_model(repository, *files)
    with pytest.raises(ConnectionError, match=words):
        download("org/name")


def test_a_blob_that_is_gone_is_missing(repository):
    add_model(repository, "config.json", "model.safetensors")
    (repository / "blobs" / "blob-of-model.safetensors").unlink()
    with pytest.raises(ConnectionError, match=r"missing are model\.safetensors"):
        download("org/name")


def test_an_adapter_alone(repository):
    add(repository, "adapter_config.json", b'{"base_model_name_or_path": "org/base"}')
    with pytest.raises(FileNotFoundError, match=r"LoRA adapter alone .*org/base"):
        find_folder("org/name")


def test_other_revisions_and_other_models(repository):
    (repository / "refs" / "main").unlink()
    with pytest.raises(ConnectionError, match=r"org/name .*other revisions of it than main: abc in .*snapshots; try"):
        download("org/name")
    shutil.rmtree(repository)
    with pytest.raises(
        ConnectionError, match=r"org/name .*offline.* not in the local cache; try again online, or pass"
    ):
        download("org/name")


@pytest.mark.parametrize("content", [b"", b"\xff", b"..", b"../../..", b".", None])
def test_a_damaged_note_of_the_revision(repository, content):
    """As after a crash while it was written; nor may it lead elsewhere."""
    add_model(repository, "config.json", "model.safetensors")
    note = repository / "refs" / "main"
    note.unlink()
    note.mkdir() if content is None else note.write_bytes(content)
    with pytest.raises(ConnectionError, match=r"other revisions .*: abc in .*, and .*refs/main is damaged; try again"):
        find_folder("org/name")


def test_pickled_weights_will_do(repository):
    add_model(repository, "config.json")
    add(repository, "pytorch_model.bin.index.json", json.dumps({"weight_map": {"a": "x.bin", "b": "y.bin"}}).encode())
    add(repository, "x.bin", b"x")
    with pytest.raises(ConnectionError, match=r"missing are y.bin;"):
        download("org/name")
    add(repository, "y.bin", b"y")
    assert download("org/name") == repository / "snapshots" / "abc"
    (repository / "snapshots" / "abc" / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(ConnectionError, match=r"missing are model.safetensors \(or"):
        download("org/name")
    add(repository, "pytorch_model.bin", b"z")
    assert download("org/name") == repository / "snapshots" / "abc"


def test_pickled_weights_are_downloaded_where_there_are_no_others(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def snapshot_download(name, *, allow_patterns, ignore_patterns):
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert download("org/name") == tmp_path
    assert asked[1:] == [["pytorch_model*.bin"]]
    (tmp_path / "model.safetensors").touch()
    assert download("org/name") == tmp_path and len(asked) == 3
