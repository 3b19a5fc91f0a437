"""A conversion deletes nothing that it did not write: what is replaced, and what is refused before any work."""

import inspect
import json
import os
import shutil
from pathlib import Path

import pytest

import decodax
from decodax.models.checkpoints import convert_target
from decodax.models.checkpoints.convert_target import MANIFEST
from decodax.models.checkpoints.write_hf import to_hf
from decodax.models.checkpoints.write_orbax import from_hf
from tests.golden_files import load_golden

LLAMA = load_golden("llama").folder


@pytest.fixture
def source(tmp_path):
    return Path(shutil.copytree(LLAMA, tmp_path / "source"))


def contents(folder):
    """Every file and link below a folder, and every empty folder."""
    found = {}
    for inside, folders, names in os.walk(folder):
        for path in (Path(inside) / name for name in (*names, *folders)):
            name = str(path.relative_to(folder))
            if path.is_symlink():
                found[name] = path.readlink()
            elif path.is_file():
                found[name] = path.read_bytes()
            elif not any(path.iterdir()):
                found[name] = None
    return found


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """A conversion is refused before anything is written or a number is read, and changes nothing."""

    def check(convert, source, target, match, kind=FileExistsError):
        before = contents(tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr(
                "decodax.models.checkpoints.reading.StoredWeights.read", lambda *args: pytest.fail("it was begun")
            )
            for overwrite in (False, True):
                with pytest.raises(kind, match=match):
                    convert(source, target, overwrite=overwrite)
        assert contents(tmp_path) == before

    return check


def test_the_folder_of_the_source_is_never_replaced(tmp_path, source, refused):
    for target in (source, source / "inside"):
        refused(from_hf, source, target, r"must not be the source .*, nor be in it", ValueError)
    refused(to_hf, source, tmp_path, r"it holds .*source, which is read: choose another name", ValueError)
    (tmp_path / "other").symlink_to(source)  # another name of it
    refused(from_hf, tmp_path / "other", source, r"must not be the source", ValueError)
    refused(from_hf, source, tmp_path / "other" / "inside", r"must not be the source", ValueError)
    refused(to_hf, decodax.load(source), source, r"must not be the source", ValueError)


def test_a_source_that_an_interrupted_conversion_moved_away_is_refused(tmp_path, source, refused):
    (tmp_path / ".target.partial").mkdir()
    old = source.rename(tmp_path / ".target.partial" / "old")
    refused(to_hf, old, tmp_path / "target", r"the source .*old is in .*.target.partial, where", ValueError)


def test_a_folder_that_the_source_links_into_is_never_replaced(tmp_path, source, refused):
    """Like a snapshot in the hub's cache: it links to its repository's blobs, which look like a checkpoint here."""
    repository = tmp_path / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    source.rename(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    refused(to_hf, snapshot, blobs, r"must not be replaced, because it holds .*, which is read", ValueError)
    refused(to_hf, snapshot, repository, r"must not be replaced, because it holds", ValueError)


def test_files_and_links_are_never_replaced(tmp_path, source, refused):
    to_hf(LLAMA, tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine")
    for name, problem in {"link": "is a link", "dangling": "is a link", "file": "is no folder"}.items():
        refused(to_hf, source, tmp_path / name, rf"{name} .*{problem}.*: choose another name")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match=r"pipe is there already and is no folder"):
        to_hf(source, tmp_path / "pipe", overwrite=True)


def test_home_current_folder_and_mount_points_are_never_replaced(tmp_path, source, refused, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()  # empty, and still not replaced
    to_hf(LLAMA, here)  # a checkpoint, and still not replaced
    monkeypatch.setenv("HOME", str(home))
    refused(to_hf, source, home, r"home is the home folder, or holds it")
    monkeypatch.chdir(here)
    for target in (here, ".", "", here / ".." / "here"):
        refused(to_hf, source, target, r"here is the current folder, or holds it")
    monkeypatch.chdir(source)
    refused(to_hf, source, here / "..", r"is the current folder, or holds it")
    refused(to_hf, source, "/", r"^/ is the current folder, or holds it")
    monkeypatch.delenv("HOME")
    mounted = tmp_path / "with a space"
    mounted.mkdir()
    mountinfo = f"36 35 98:0 /a {str(mounted).replace(' ', chr(92) + '040')} rw - ext3 /dev/root rw\n"
    monkeypatch.setattr(convert_target.Path, "read_text", lambda path, **options: mountinfo)
    refused(to_hf, source, mounted, r"is a mount point")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, source, refused, monkeypatch):
    refused(to_hf, source, source / "config.json" / "x", r"config.json is no folder", NotADirectoryError)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the user of the test may have every permission
    refused(to_hf, source, tmp_path / "out", r"no permission to write in", PermissionError)


def test_missing_parent_folders_are_made(tmp_path, source):
    to_hf(source, tmp_path / "no" / "where")
    assert (tmp_path / "no" / "where" / "config.json").is_file()


@pytest.mark.parametrize("convert", [from_hf, to_hf])
def test_a_target_may_be_named_from_elsewhere(tmp_path, source, convert, monkeypatch):
    """By "..", through a linked folder, or from the home folder, which no shell expands in --output=~/model."""
    (tmp_path / "work").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))
    for target, place in (("../one", "one"), ("../linked/../two", "two"), ("~/three", "three")):
        assert convert(source, target).target == tmp_path / place
        assert decodax.load(f"../{place}").nbytes == decodax.load(source).nbytes
    assert not any((tmp_path / "work").iterdir())


@pytest.mark.parametrize(
    ("target", "match"),
    [
        (5, r"target must be the path of a folder, as text or pathlib.Path, got 5"),
        ("a\0b", r"target must be a path that this system allows, got 'a\\x00b'"),
        ("n" * 250, r"target must be a path that this system allows, and it is too long, got .*\.partial"),
        ("~nobody-of-this-name/x", r"~nobody-of-this-name/x cannot be written: "),
    ],
)
def test_bad_paths_are_refused_by_name(source, target, match):
    for convert in map(inspect.unwrap, (from_hf, to_hf)):
        with pytest.raises(ValueError, match=match):
            convert(source, target)
        with pytest.raises(ValueError, match=r"source must be the path of a folder.*or a loaded model, got 5"):
            convert(5, "target")


def test_arrays_in_a_folder_whose_name_is_not_utf8(tmp_path, source):
    for folder in (tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / "target"):
        if folder.name == "target":
            from_hf(source, folder)
            folder = folder.rename(tmp_path / os.fsdecode(b"\xe9"))
            with pytest.raises(ValueError, match=r"has a name that is no UTF-8"):
                decodax.load(folder)
        else:
            with pytest.raises(ValueError, match=r"has a name that is no UTF-8"):
                from_hf(source, folder)
            to_hf(source, folder)  # Python writes its files


def test_other_folders_are_refused(tmp_path, source, refused):
    """A checkpoint of the other form is not replaced either."""
    to_hf(LLAMA, tmp_path / "hf")
    from_hf(LLAMA, tmp_path / "orbax")
    for name in ("hf", "orbax"):
        (tmp_path / name / MANIFEST).unlink()
    (tmp_path / "mine" / "mail").mkdir(parents=True)
    refused(from_hf, source, tmp_path / "mine", r"mine .*is neither a folder that convert wrote nor an Orbax")
    refused(from_hf, source, tmp_path / "hf", r"hf .*is neither a folder that convert wrote nor an Orbax checkpoint")
    refused(to_hf, source, tmp_path / "orbax", r"orbax .*is neither .* nor a Hugging Face folder \(safetensors\)")


FOREIGN = {
    "notes.txt": "file",
    "results.json": "file",  # convert copies such a file from a source, but this one it did not
    "medusa.safetensors": "file",
    "runs": "folder",
    "model.safetensors.bak": "link",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_user_s_files_beside_the_weights_are_not_lost(tmp_path, source, refused, name, has_manifest):
    to_hf(LLAMA, tmp_path / "hf", dtype="bfloat16")
    if not has_manifest:
        (tmp_path / "hf" / MANIFEST).unlink()
    if FOREIGN[name] == "file":
        (tmp_path / "hf" / name).write_text("mine")
    elif FOREIGN[name] == "folder":
        (tmp_path / "hf" / name).mkdir()
    else:
        (tmp_path / "hf" / name).symlink_to(source)
    what = "convert did not write" if has_manifest else "does not belong to a checkpoint"
    refused(to_hf, source, tmp_path / "hf", rf"hf is there already and holds {name}, which {what}: choose .*, or move")


@pytest.mark.parametrize("name", ["notes.txt", "embedding/notes", "mine/deep/0.0.txt", "head/0.x"])
def test_a_user_s_files_among_the_arrays_are_not_lost(tmp_path, source, refused, name):
    from_hf(LLAMA, tmp_path / "orbax", dtype="bfloat16")
    (tmp_path / "orbax" / "params" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "orbax" / "params" / name).write_text("mine")
    refused(from_hf, source, tmp_path / "orbax", rf"holds params/{name}, which convert did not write")


def test_targets_that_are_replaced(tmp_path, source):
    """What convert wrote, in either form, with all copied files; a checkpoint of the same form; an empty folder."""
    (source / "results.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    to_hf(source, tmp_path / "empty")
    assert (tmp_path / "empty" / "results.json").exists()
    from_hf(source, tmp_path / "empty", overwrite=True)
    to_hf(source, tmp_path / "empty", max_shard_bytes=20_000, overwrite=True)
    assert "model-00001-of-00005.safetensors" in json.loads((tmp_path / "empty" / MANIFEST).read_text())["files"]
    shutil.copytree(LLAMA, tmp_path / "downloaded")
    for own in (tmp_path / "downloaded").glob("golden*"):
        own.unlink()
    (tmp_path / "downloaded" / "tokenizer.json").write_text("{}")
    to_hf(source, tmp_path / "downloaded", overwrite=True)
    from_hf(LLAMA, tmp_path / "orbax")
    (tmp_path / "orbax" / MANIFEST).unlink()
    from_hf(source, tmp_path / "orbax", overwrite=True)
    for name in ("empty", "downloaded", "orbax"):
        assert decodax.load(tmp_path / name).config == decodax.load(source).config
    assert sorted(os.listdir(tmp_path)) == ["downloaded", "empty", "orbax", "source"]


def test_a_target_that_lost_a_file_is_not_finished(tmp_path, source):
    (source / "tokenizer.json").write_text("{}")
    to_hf(source, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    with pytest.raises(FileExistsError, match=r"hf is there already: .* pass overwrite=True"):
        to_hf(source, tmp_path / "hf")
    to_hf(source, tmp_path / "hf", overwrite=True)
    assert (tmp_path / "hf" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "content", [b"[]", b"{", b"\xff", b'{"a":' * 100_000, b'{"form": "hf", "written_by": 3}', None]
)
def test_bad_manifests_are_refused(tmp_path, source, refused, content):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    if content is None:  # links are not followed
        (tmp_path / "manifest").write_text('{"form": "hf", "written_by": "decodax 1", "files": ["notes.txt"]}')
        (tmp_path / "mine" / MANIFEST).symlink_to(tmp_path / "manifest")
    else:
        (tmp_path / "mine" / MANIFEST).write_bytes(content)
    refused(to_hf, source, tmp_path / "mine", r"is neither a folder that convert wrote nor")


def test_a_link_out_of_the_source_is_not_copied(tmp_path, source):
    (tmp_path / "secret").write_text("secret")
    (source / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is a link to .*secret, outside the model's folder"):
        to_hf(source, tmp_path / "out")
    (source / "tokenizer_config.json").unlink()
    (source / "tokenizer_config.json").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is a link to nowhere, which is not there"):
        to_hf(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["secret", "source"]


def test_an_adapter_is_not_copied_without_its_weights(tmp_path, source):
    """Its weights are not converted, so its config is not copied either."""
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.warns(UserWarning, match="LoRA adapter"):
        to_hf(source, tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
