"""A staged folder appears complete or not at all: after a kill, on a full disk, or beside another process."""

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
from dataclasses import dataclass
from pathlib import Path

import filelock
import pytest

import decodax
from decodax.models.checkpoints import staged_folder
from decodax.models.checkpoints.staged_folder import DiskFullError
from decodax.models.checkpoints.write_hf import to_hf
from decodax.models.checkpoints.write_orbax import from_hf
from tests.golden_files import load_golden

LLAMA, MIXTRAL = load_golden("llama").folder, load_golden("mixtral").folder
PLAN = {"what": "a test"}


def nothing():
    pass


@dataclass
class Guard:
    """Nothing is replaced without `overwrite`, and a folder with a file "mine" never."""

    target: Path
    overwrite: bool = True

    def check(self):
        if self.target.exists() and not self.overwrite:
            raise FileExistsError(f"{self.target} is there already")
        self.check_contents(self.target)

    def check_contents(self, folder):
        if (folder / "mine").exists():
            raise FileExistsError(f"{folder} holds mine")


def staged(target, plan=PLAN, **options):
    return staged_folder.staged(target, plan, Guard(target), **options)


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_the_folder_appears_at_the_end(tmp_path):
    target = tmp_path / "target"
    with staged(target) as folder:
        folder.write_file("sub/a", b"1")
        assert not target.exists()
    assert contents(tmp_path) == {"target/sub/a": b"1"}


def test_recorded_pieces_are_not_written_again(tmp_path, monkeypatch):
    target, synced = tmp_path / "target", []
    monkeypatch.setattr(staged_folder, "JOURNAL_BYTES", 10)
    with pytest.raises(RuntimeError), staged(target) as folder:
        assert folder.done == frozenset()
        folder.note("a", 6, lambda: synced.append("a"))
        assert synced == []
        folder.note("b", 6, lambda: synced.append("b"))
        folder.note("c", 6, lambda: synced.append("c"))  # written, but maybe not yet on the disk
        folder.write_file("x", b"1")
        raise RuntimeError
    assert synced == ["b"] and not target.exists()
    journal = tmp_path / ".target.partial" / "journal"
    journal.write_text(journal.read_text() + "cut o")
    with pytest.raises(RuntimeError), staged(target) as folder:
        assert folder.done == {"a", "b"}
        folder.note("d", 20, nothing)
        raise RuntimeError
    with staged(target) as folder:
        assert folder.done == {"a", "b", "d"} and contents(folder.content) == {"x": b"1"}
    assert contents(tmp_path) == {"target/x": b"1"}


@pytest.mark.parametrize("options", [{"plan": {"what": "another"}}, {"plan": PLAN, "resume": False}])
def test_another_plan_starts_anew(tmp_path, options):
    target = tmp_path / "target"
    with pytest.raises(RuntimeError), staged(target) as folder:
        folder.write_file("x", b"1")
        folder.note("a", 1, nothing)
        folder.flush(nothing)
        raise RuntimeError
    with staged(target, **options) as folder:
        assert folder.done == frozenset() and contents(folder.content) == {}


def test_one_process_at_a_time(tmp_path):
    with staged(tmp_path / "target") as folder:
        folder.write_file("x", b"1")
        with (
            pytest.raises(BlockingIOError, match=r"another process is writing .*target right now"),
            staged(tmp_path / "target", {}),
        ):
            pass
    assert contents(tmp_path) == {"target/x": b"1"}


def test_a_process_that_begins_while_another_ends(tmp_path, monkeypatch):
    """It starts anew in the folder that is being removed, whose lock is gone already, and is not disturbed."""
    target, rmdir, begun = tmp_path / "target", Path.rmdir, []

    def begin_first(folder):
        if not begun:
            begun.append(folder)
            with staged(target, {"n": 2}) as other:
                other.write_file("x", b"2")
                rmdir_or_not(folder)
        rmdir(folder)

    def rmdir_or_not(folder):
        with pytest.raises(OSError, match=r"not empty"):
            rmdir(folder)

    monkeypatch.setattr(Path, "rmdir", begin_first)
    with staged(target, {"n": 1}) as folder:
        folder.write_file("x", b"1")
    assert begun and contents(tmp_path) == {"target/x": b"2"}


def test_a_lock_whose_file_is_gone_does_not_count(tmp_path, monkeypatch):
    """Another process has removed its lock since; by now there may be a new one."""
    acquire, acquired = filelock.FileLock.acquire, []

    def lose_first(lock, **options):
        acquired.append(acquire(lock, **options))
        if len(acquired) == 1:
            Path(lock.lock_file).unlink()
        return acquired[-1]

    monkeypatch.setattr(filelock.FileLock, "acquire", lose_first)
    with staged(tmp_path / "target") as folder:
        folder.write_file("x", b"1")
        assert (tmp_path / ".target.partial" / "lock").exists()
    assert len(acquired) == 2 and contents(tmp_path) == {"target/x": b"1"}


def replaceable(target):
    target.mkdir()
    (target / "old").write_bytes(b"old")


def test_a_replaced_target_stays_until_the_new_one_is_complete(tmp_path):
    target = tmp_path / "target"
    replaceable(target)
    with (
        pytest.raises(FileExistsError, match=r"is there already"),
        staged_folder.staged(target, PLAN, Guard(target, overwrite=False)),
    ):
        pass
    assert contents(tmp_path) == {"target/old": b"old"}
    with staged(target) as folder:
        folder.write_file("new", b"1")
        assert contents(target) == {"old": b"old"}
    assert contents(tmp_path) == {"target/new": b"1"}


def ended_between_the_renames(tmp_path, monkeypatch):
    """As if the process had been killed between the renames: the target is moved away, the new one not yet in place."""
    rename, renamed = os.rename, []

    def end_after_one(source, destination):
        if renamed:
            raise KeyboardInterrupt
        renamed.append(destination)
        rename(source, destination)

    replaceable(tmp_path / "target")
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", end_after_one)
        with pytest.raises(KeyboardInterrupt), staged(tmp_path / "target", {"n": 3}) as folder:
            folder.write_file("new", b"2")
    assert renamed and contents(tmp_path / ".target.partial" / "old") == {"old": b"old"}
    assert not (tmp_path / "target").exists()


def test_a_target_that_was_moved_away_is_restored(tmp_path, monkeypatch):
    ended_between_the_renames(tmp_path, monkeypatch)
    target = tmp_path / "target"
    with (
        pytest.raises(FileExistsError),
        staged_folder.staged(target, {"n": 3}, Guard(target, overwrite=False)),
    ):
        pass
    assert contents(target) == {"old": b"old"}
    with staged(target, {"n": 3}):
        pass
    assert contents(tmp_path) == {"target/new": b"2"}


def test_a_target_that_was_moved_away_is_kept_beside_another(tmp_path, monkeypatch):
    ended_between_the_renames(tmp_path, monkeypatch)
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_bytes(b"3")
    (tmp_path / "target.old").write_bytes(b"4")  # its name is taken
    with pytest.raises(FileExistsError, match=r"holds mine"), staged(target, {"n": 3}):
        pass
    assert contents(tmp_path / ".target.partial" / "old") == {"old": b"old"}
    (target / "mine").rename(target / "other")
    with (
        pytest.warns(UserWarning, match=r"what was at .*target is kept as .*target.old1: it was to be replaced"),
        staged(target, {"n": 3}),
    ):
        pass
    assert contents(tmp_path) == {"target/new": b"2", "target.old": b"4", "target.old1/old": b"old"}


def test_a_swap_that_fails_is_undone(tmp_path, monkeypatch):
    rename, target = os.rename, tmp_path / "target"
    replaceable(target)

    def refuse_content(source, destination):
        if Path(source).name == "content":
            raise PermissionError(errno.EACCES, "no")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", refuse_content)
    with pytest.raises(PermissionError), staged(target) as folder:
        folder.write_file("new", b"1")
    assert contents(target) == {"old": b"old"}

    def refuse_to_undo(source, destination):
        if Path(destination) == target:
            raise PermissionError(errno.EACCES, "no")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", refuse_to_undo)
    old = tmp_path / ".target.partial" / "old"
    with pytest.raises(OSError, match=rf"could not be replaced .*; what was there is now {old}"), staged(target):
        pass
    assert contents(old) == {"old": b"old"} and contents(old.with_name("content")) == {"new": b"1"}
    monkeypatch.setattr(os, "rename", rename)
    with staged(target):
        pass
    assert contents(tmp_path) == {"target/new": b"1"}


def test_files_written_into_the_target_meanwhile_are_kept(tmp_path, monkeypatch):
    """Written while the new folder is made, or between the last check and the replacement."""
    target, rename = tmp_path / "target", os.rename
    replaceable(target)
    with pytest.raises(FileExistsError, match=r"holds mine"), staged(target) as folder:
        folder.write_file("new", b"1")
        (target / "mine").write_bytes(b"2")
    assert contents(target) == {"old": b"old", "mine": b"2"}
    (target / "mine").unlink()

    def write_first(source, destination):
        if Path(source) == target:
            (target / "mine").write_bytes(b"3")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", write_first)
    with pytest.warns(UserWarning, match=r"is kept as .*target.old: .* holds mine"), staged(target):
        pass
    assert contents(tmp_path) == {"target/new": b"1", "target.old/old": b"old", "target.old/mine": b"3"}


@pytest.mark.parametrize("kind", ["folder", "file", "link", "content"])
def test_a_foreign_partial_folder_is_left_alone(tmp_path, kind):
    partial, elsewhere = tmp_path / ".target.partial", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "content").write_bytes(b"1")
    if kind == "folder":
        partial.mkdir()
        (partial / "download").write_bytes(b"1")
    elif kind == "content":
        (partial / "content").mkdir(parents=True)
        (partial / "content" / "download").write_bytes(b"1")
    elif kind == "file":
        partial.write_bytes(b"1")
    else:
        partial.symlink_to(elsewhere)
    before = contents(tmp_path)
    with (
        pytest.raises(FileExistsError, match=r"\.target\.partial (holds (download|content)|must be a folder)"),
        staged(tmp_path / "target"),
    ):
        pass
    assert contents(tmp_path) == before and partial.is_symlink() == (kind == "link")


@pytest.mark.parametrize("name", ["content", "journal", "lock", "old", "plan.json", "plan.tmp"])
def test_nothing_is_written_through_a_link(tmp_path, name):
    """Such as a link that was made to continue on a larger disk."""
    partial, elsewhere = tmp_path / ".target.partial", tmp_path / "elsewhere"
    partial.mkdir()
    (partial / "lock").touch()
    (partial / name).unlink(missing_ok=True)
    elsewhere.mkdir()
    (elsewhere / "new").write_bytes(b"mine")
    (partial / name).symlink_to(elsewhere)
    with (
        pytest.raises(FileExistsError, match=rf"\.target\.partial holds {name}, a link"),
        staged(tmp_path / "target") as folder,
    ):
        folder.write_file("new", b"1")
    assert contents(elsewhere) == {"new": b"mine"}


ALONE = """
    import collections, importlib.util, os, shutil, signal, sys, time
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("staged_folder", sys.argv[1])
    staged_folder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(staged_folder)
    root = Path(sys.argv[2])
    target = root / "target"
    EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "open", "os.scandir"}

    class Guard:
        def check(self):
            self.check_contents(target)

        def check_contents(self, folder):
            if folder.exists() and not {file.name for file in folder.iterdir()} <= {"old", "new", "more"}:
                raise FileExistsError(str(folder))

    def contents(folder):
        return {file.name: file.read_text() for file in folder.iterdir()} if folder.is_dir() else None

    def make(name, moment=None):
        events = 0

        def kill(event, arguments):
            nonlocal events
            if event in EVENTS and str(root) in str(arguments):
                events += 1
                if events == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        if moment is not None:
            sys.addaudithook(kill)
        with staged_folder.staged(target, {"name": name}, Guard()) as folder:
            folder.write_file("new", name.encode())
            folder.note("new", 1, lambda: None)
            folder.flush(lambda: None)
            folder.write_file("more", name.encode())

    def forked(work, *arguments):
        process = os.fork()
        if process:
            return process
        try:
            work(*arguments)
            os._exit(0)
        except (BlockingIOError, FileExistsError):
            os._exit(3)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(4)
"""


def alone(script, tmp_path):
    """Runs a script that uses the module without the rest of the package, so that it may fork; returns its output."""
    command = [sys.executable, "-c", textwrap.dedent(ALONE) + textwrap.dedent(script)]
    done = subprocess.run(
        [*command, staged_folder.__file__, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and not done.stderr, done.stderr + done.stdout
    return done.stdout


def test_killed_at_every_moment_of_replacing_a_target(tmp_path):
    """Killed at each file-system call in turn: the old folder, the new one, or the old one ready to be restored."""
    output = alone(
        """
        old, new, moment, seen = {"old": "mine"}, {"new": "x", "more": "x"}, 0, collections.Counter()
        while True:
            moment += 1
            shutil.rmtree(root, ignore_errors=True)
            target.mkdir(parents=True)
            (target / "old").write_text("mine")
            (root / "other").write_text("mine")
            _, status = os.waitpid(forked(make, "x", moment), 0)
            if not status:
                break
            assert os.WIFSIGNALED(status), status
            found, moved = contents(target), contents(root / ".target.partial" / "old")
            assert found in (old, new) or (found is None and moved == old), (moment, found, moved)
            seen["nothing" if found is None else "old" if found == old else "new"] += 1
            assert os.waitpid(forked(make, "x"), 0)[1] == 0
            names = sorted(path.name for path in root.iterdir())
            assert contents(target) == new and names == ["other", "target"], (moment, names)
        print(moment, seen["nothing"], seen["old"], seen["new"])
        """,
        tmp_path / "root",
    )
    moments, *seen = map(int, output.split())
    assert moments > 30 and min(seen) > 0, output


@pytest.mark.parametrize("rounds", [15, pytest.param(400, marks=pytest.mark.slow)])
def test_two_processes_at_once(tmp_path, rounds):
    """Repeatedly, the second ever later: the target is complete and one of the two, with nothing left beside it."""
    output = alone(
        f"""
        rounds = {rounds}
        """
        """
        ends, start = collections.Counter(), time.monotonic()
        os.waitpid(forked(make, "x"), 0)
        duration = time.monotonic() - start
        for round in range(rounds):
            shutil.rmtree(target, ignore_errors=True)
            start = time.monotonic() + 0.003

            def begin(name, pause):
                time.sleep(max(start + pause - time.monotonic(), 0))
                make(name)

            pauses = (0, 1.2 * duration * round / rounds)
            processes = [forked(begin, name, pause) for name, pause in zip("xy", pauses)]
            codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
            found = contents(target)
            assert found in [{"new": name, "more": name} for name in "xy"], found
            assert 0 in codes and set(codes) <= {0, 3}, codes
            assert [path.name for path in root.iterdir()] == ["target"], list(root.iterdir())
            ends[sum(codes)] += 1
        print(ends[0], ends[3])
        """,
        tmp_path,
    )
    one_after_the_other, one_refused = map(int, output.split())
    assert one_after_the_other + one_refused == rounds and one_refused > 0


CONVERTING = """
    import sys
    from decodax.models.checkpoints import staged_folder
    from decodax.models.checkpoints.write_orbax import from_hf
    from decodax.models.checkpoints.write_hf import to_hf

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
    """A process that converts and records every piece, once it has written `pieces` of them, if as many are left."""
    command = [sys.executable, "-c", textwrap.dedent(CONVERTING), kind, str(MIXTRAL), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(1 + pieces):
        process.stdout.readline()
    return process


def killed_and_resumed(tmp_path, kind, moments, number=signal.SIGKILL):
    """Killed by a signal at each of these moments (pieces written and seconds after the start), then run to its end.

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
        process.send_signal(number)
        process.communicate(timeout=300)
        if process.returncode != -number or target.exists():
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


@pytest.mark.parametrize(("kind", "number"), [("from_hf", signal.SIGTERM), ("to_hf", signal.SIGKILL)])
@pytest.mark.quick_cases(1)
def test_a_killed_conversion_resumes(tmp_path, kind, number):
    kills, resumed_bytes = killed_and_resumed(tmp_path, kind, [(7, 0.002)], number)
    assert kills == 1 and resumed_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["from_hf", "to_hf"])
def test_a_conversion_killed_at_ten_random_moments_resumes(tmp_path, kind, number):
    chance = random.Random(0)
    moments = [(chance.randint(0, 3), chance.uniform(0, 0.003)) for _ in range(10)]
    kills, resumed_bytes = killed_and_resumed(tmp_path, kind, moments, number)
    assert kills == 10 and resumed_bytes > 0


@pytest.mark.parametrize("kind", ["from_hf", "to_hf"])
def test_a_full_disk_is_reported_and_leaves_nothing_that_loads(tmp_path, kind):
    """No file may grow beyond 3,000 bytes, as on a disk that fills up while it is written; then there is room."""
    convert = from_hf if kind == "from_hf" else to_hf
    convert(LLAMA, tmp_path / "expected")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(DiskFullError, match=r"no room for all of .*target .*run the same again, which continues"):
            convert(LLAMA, tmp_path / "target")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "target").exists()
    for folder in (tmp_path / ".target.partial", tmp_path / ".target.partial" / "content"):
        with pytest.raises(FileNotFoundError, match=r"has no config.json"):
            decodax.load(folder)
    convert(LLAMA, tmp_path / "target")
    assert contents(tmp_path / "target") == contents(tmp_path / "expected")


def test_free_space_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskFullError, match=r"^\d+,\d+ bytes are still to be written and 1,000 are free for target"):
        from_hf(LLAMA, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_other_disk_errors_pass_unchanged(tmp_path, number):
    with pytest.raises(DiskFullError), staged(tmp_path / "target"):
        raise OSError(number, "no")
    with pytest.raises(PermissionError), staged(tmp_path / "target"):
        raise PermissionError(errno.EACCES, "no")
    assert list(tmp_path.iterdir()) == []  # nothing was written to resume from
