"""A folder is there whole or not at all: killed at any moment, on a full disk, or beside another process."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

import decodax
from decodax.models import staged_folder
from decodax.models.from_hf import from_hf
from decodax.models.staged_folder import DiskFullError, staged
from decodax.models.to_hf import to_hf
from tests.golden_files import load_golden

LLAMA, MIXTRAL = load_golden("llama").folder, load_golden("mixtral").folder
PLAN = {"what": "a test"}


def nothing():
    pass


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_it_appears_at_the_end(tmp_path):
    target = tmp_path / "deep" / "target"
    with staged(target, PLAN, overwrite=False) as folder:
        folder.write_file("sub/a", b"1")
        assert not target.exists()
    assert contents(tmp_path) == {"deep/target/sub/a": b"1"}


def test_what_was_noted_is_not_made_again(tmp_path, monkeypatch):
    target, synced = tmp_path / "target", []
    monkeypatch.setattr(staged_folder, "JOURNAL_BYTES", 10)
    with pytest.raises(RuntimeError), staged(target, PLAN, overwrite=False) as folder:
        assert folder.done == frozenset()
        folder.note("a", 6, lambda: synced.append("a"))
        assert synced == []
        folder.note("b", 6, lambda: synced.append("b"))
        folder.note("c", 6, lambda: synced.append("c"))  # written, and nobody knows whether it is on the disk
        folder.write_file("x", b"1")
        raise RuntimeError
    assert synced == ["b"] and not target.exists()
    journal = tmp_path / ".target.partial" / "journal"
    journal.write_text(journal.read_text() + "cut o")
    with pytest.raises(RuntimeError), staged(target, PLAN, overwrite=False) as folder:
        assert folder.done == {"a", "b"}
        folder.note("d", 20, nothing)
        raise RuntimeError
    with staged(target, PLAN, overwrite=False) as folder:
        assert folder.done == {"a", "b", "d"} and contents(folder.content) == {"x": b"1"}
    assert contents(tmp_path) == {"target/x": b"1"}


@pytest.mark.parametrize("options", [{"plan": {"what": "another"}}, {"plan": PLAN, "resume": False}])
def test_another_plan_begins_anew(tmp_path, options):
    target = tmp_path / "target"
    with pytest.raises(RuntimeError), staged(target, PLAN, overwrite=False) as folder:
        folder.write_file("x", b"1")
        folder.note("a", 1, nothing)
        folder.flush(nothing)
        raise RuntimeError
    with staged(target, overwrite=False, **options) as folder:
        assert folder.done == frozenset() and contents(folder.content) == {}


def test_one_process_at_a_time(tmp_path):
    with staged(tmp_path / "target", PLAN, overwrite=False) as folder:
        folder.write_file("x", b"1")
        with (
            pytest.raises(BlockingIOError, match=r"another process is writing .*target right now"),
            staged(tmp_path / "target", {}, overwrite=False),
        ):
            pass
    assert contents(tmp_path) == {"target/x": b"1"}


def test_a_replaced_target_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(FileExistsError, match=r"is there already"), staged(target, PLAN, overwrite=False):
        pass
    with staged(target, PLAN, overwrite=True) as folder:
        folder.write_file("new", b"1")
        assert contents(target) == {"old": b"old"}
    assert contents(tmp_path) == {"target/new": b"1"}
    rename, renamed = os.rename, []

    def end_after_one(source, destination):  # as if the process were killed between the two
        if renamed:
            raise KeyboardInterrupt
        renamed.append(destination)
        rename(source, destination)

    monkeypatch.setattr(os, "rename", end_after_one)
    with pytest.raises(KeyboardInterrupt), staged(target, {"n": 3}, overwrite=True) as folder:
        folder.write_file("newer", b"2")
    assert renamed and not target.exists()
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(FileExistsError), staged(target, {"n": 4}, overwrite=False):
        pass
    assert contents(target) == {"new": b"1"}  # it is back
    with staged(target, {"n": 3}, overwrite=True):
        pass
    assert contents(tmp_path) == {"target/newer": b"2"}


CONVERTING = """
    import sys
    from decodax.models import staged_folder
    from decodax.models.from_hf import from_hf
    from decodax.models.to_hf import to_hf

    staged_folder.JOURNAL_BYTES, note = 1, staged_folder.StagedFolder.note

    def told(self, *arguments):
        note(self, *arguments)
        print("piece", flush=True)

    staged_folder.StagedFolder.note = told
    options = {} if sys.argv[1] == "from_hf" else {"max_shard_bytes": 20_000}
    print("begins", flush=True)
    done = (from_hf if sys.argv[1] == "from_hf" else to_hf)(sys.argv[2], sys.argv[3], **options)
    print(done.resumed_bytes)
"""


def converting(kind, target, pieces):
    """A process that converts and notes every piece; it has written so many of them, if there were as many left."""
    command = [sys.executable, "-c", textwrap.dedent(CONVERTING), kind, str(MIXTRAL), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(1 + pieces):
        process.stdout.readline()
    return process


def killed_and_resumed(tmp_path, kind, moments):
    """Killed at each of these moments (so many pieces and seconds after it began), each time going on; then to its end.

    Returns how many times it was killed, and the bytes that the last process found written.
    """
    expected, target, kills = tmp_path / "expected", tmp_path / "target", 0
    if kind == "from_hf":
        from_hf(MIXTRAL, expected)
    else:
        to_hf(MIXTRAL, expected, max_shard_bytes=20_000)
    for pieces, seconds in moments:
        process = converting(kind, target, pieces)
        time.sleep(seconds)
        process.kill()
        process.communicate(timeout=300)
        if process.returncode != -signal.SIGKILL or target.exists():
            break
        kills += 1
        content = tmp_path / ".target.partial" / "content"
        for folder in (target, content.parent, content):
            if folder == content and (content / "config.json").exists():  # written last
                assert contents(content) == contents(expected)
                continue
            with pytest.raises(FileNotFoundError):
                decodax.load(folder)
    output, errors = converting(kind, target, 0).communicate(timeout=300)
    assert contents(target) == contents(expected), errors
    assert not (tmp_path / ".target.partial").exists()
    return kills, int(output.split()[-1])


@pytest.mark.parametrize("kind", ["from_hf", "to_hf"])
def test_killed_it_goes_on(tmp_path, kind):
    kills, resumed_bytes = killed_and_resumed(tmp_path, kind, [(7, 0.002)])
    assert kills == 1 and resumed_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["from_hf", "to_hf"])
def test_killed_at_ten_random_moments_it_goes_on(tmp_path, kind):
    chance = random.Random(0)
    moments = [(chance.randint(0, 3), chance.uniform(0, 0.003)) for _ in range(10)]
    kills, resumed_bytes = killed_and_resumed(tmp_path, kind, moments)
    assert kills == 10 and resumed_bytes > 0


@pytest.mark.parametrize("kind", ["from_hf", "to_hf"])
def test_a_full_disk_is_told_and_leaves_nothing_that_loads(tmp_path, kind):
    """No file may grow beyond 3,000 bytes, as on a disk that fills up while it is written; then there is room."""
    convert = from_hf if kind == "from_hf" else to_hf
    convert(LLAMA, tmp_path / "expected")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(DiskFullError, match=r"no room for all of .*target .*run the same again, which goes on"):
            convert(LLAMA, tmp_path / "target")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "target").exists()
    for folder in (tmp_path / ".target.partial", tmp_path / ".target.partial" / "content"):
        with pytest.raises(FileNotFoundError, match=r"has no config.json"):
            decodax.load(folder)
    convert(LLAMA, tmp_path / "target")
    assert contents(tmp_path / "target") == contents(tmp_path / "expected")


def test_room_is_looked_for_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskFullError, match=r"^\d+,\d+ bytes are still to be written and 1,000 are free where target"):
        from_hf(LLAMA, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_other_errors_of_the_disk_are_their_own(tmp_path, number):
    with pytest.raises(DiskFullError), staged(tmp_path / "target", PLAN, overwrite=False):
        raise OSError(number, "no")
    with pytest.raises(PermissionError), staged(tmp_path / "target", PLAN, overwrite=False):
        raise PermissionError(errno.EACCES, "no")
    assert list(tmp_path.iterdir()) == []  # nothing was written that one could go on from
