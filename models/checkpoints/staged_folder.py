"""Writes a folder atomically, complete or not at all, and resumes writing after an interruption.

Beside the target `name` a folder `.name.partial` is filled: `content`, which becomes the target by one rename at the
end; `plan.json`, what is being written; and `journal`, the names of the pieces that are safely on the disk. A process
that is killed leaves it there, and the next one with the same plan continues; one with another plan starts over.

What the target replaces is moved to `.name.partial/old` first, and removed only when the new folder is in place and
nothing in the old one is a user's own. One that was moved away by a process that was then killed is moved back.
"""

import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import filelock

JOURNAL_BYTES = 2**26  # written before they are synced to the disk and noted in the journal

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no space, quota reached, file too large
_NAMES = {"content", "plan.json", "plan.tmp", "journal", "lock", "old"}  # in the folder beside the target
_MOST_TRIES = 100  # to lock a folder that another process is just removing


class DiskFullError(OSError):
    """The disk has no room for what is to be written."""


@runtime_checkable
class Guard(Protocol):
    """Says what must not be replaced (`models/checkpoints/convert_target.py`)."""

    def check(self) -> None:
        """Raises an error if what is at the target must stay."""
        ...

    def check_contents(self, folder: Path) -> None:
        """Raises an error if this folder, which was at the target, must not be removed."""
        ...


class StagedFolder:
    """A folder being written: `content` is where to write, `done` the pieces that an earlier process wrote."""

    def __init__(self, partial: Path) -> None:
        self.content = partial / "content"
        self._journal = partial / "journal"
        lines = self._journal.read_text(encoding="utf-8").split("\n") if self._journal.is_file() else [""]
        self.done = frozenset(lines[:-1])  # the last is empty or incomplete
        with self._journal.open("w", encoding="utf-8") as stream:
            stream.writelines(f"{line}\n" for line in lines[:-1])
        self._unflushed: list[str] = []
        self._unflushed_bytes = 0

    def note(self, piece: str, num_bytes: int, sync: Callable[[], None]) -> None:
        """Notes a piece as written; `sync`, called now and then, syncs all that was noted to the disk."""
        self._unflushed.append(piece)
        self._unflushed_bytes += num_bytes
        if self._unflushed_bytes >= JOURNAL_BYTES:
            self.flush(sync)

    def flush(self, sync: Callable[[], None]) -> None:
        """Syncs the noted pieces and writes them to the journal, so that they are never written again."""
        sync()
        with self._journal.open("a", encoding="utf-8") as stream:
            stream.writelines(f"{piece}\n" for piece in self._unflushed)
            stream.flush()
            os.fsync(stream.fileno())
        self._unflushed, self._unflushed_bytes = [], 0

    def write_file(self, name: str, content: bytes) -> None:
        """Writes a small file atomically and syncs it."""
        file = self.content / name
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.tmp")
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)

    def require(self, num_bytes: int) -> None:
        """Raises DiskFullError, before anything is written, if `num_bytes` do not fit on the disk."""
        free = shutil.disk_usage(self.content).free
        if num_bytes > free:
            raise DiskFullError(
                f"{num_bytes:,} bytes are still to be written and {free:,} are free for {self._target}: make room, or "
                "choose another place"
            )

    @property
    def _target(self) -> str:
        return self.content.parent.name.removeprefix(".").removesuffix(".partial")


def partial_of(target: Path) -> Path:
    """The folder beside a target in which it is written."""
    return target.with_name(f".{target.name}.partial")


def forget_partial(target: Path, guard: Guard) -> None:
    """Removes what a process that was killed right after the rename has left beside a finished target."""
    partial = partial_of(target)
    if partial.is_dir() and not (partial / "content").exists():
        with suppress(BlockingIOError, FileExistsError), _locked(partial, target):
            _discard_old(partial, target, guard)
            _tidy(partial)


def same_plan(file: Path, plan: Mapping[str, Any]) -> bool:
    """Whether a JSON file holds exactly this plan."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) == plan
    except (OSError, ValueError):
        return False


@contextmanager
def staged(target: Path, plan: Mapping[str, Any], guard: Guard, *, resume: bool = True) -> Iterator[StagedFolder]:
    """A folder to fill, which becomes `target` when the block ends without an error.

    target: the folder to write.
    plan: what is being written, as JSON; an earlier process's work is continued only if its plan is the same.
    guard: says what may be replaced; asked before the block, after it, and before what was replaced is removed.
    resume: whether the same plan means the same bytes.
    Raises BlockingIOError while another process fills it, DiskFullError, and what the guard raises.
    """
    guard.check()
    partial = partial_of(target)
    with _told_when_full(target), _locked(partial, target):
        try:
            _restore(partial, target, guard)
            guard.check()
            if not resume or not same_plan(partial / "plan.json", plan):
                _begin(partial, plan)
            (partial / "content").mkdir(exist_ok=True)
            yield StagedFolder(partial)
            _sync_folders(partial / "content")
            guard.check()
            _replace(partial, target)
            _discard_old(partial, target, guard)
        finally:
            _tidy(partial)


@contextmanager
def _locked(partial: Path, target: Path) -> Iterator[None]:
    """Makes the folder beside the target and locks it against other processes."""
    for _ in range(_MOST_TRIES):
        lock = filelock.FileLock(partial / "lock")
        try:
            _claim(partial)
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise BlockingIOError(f"another process is writing {target} right now: wait for it, or end it") from None
        except FileNotFoundError:  # another process has just removed the folder
            continue
        if (partial / "lock").exists():
            break
        lock.release()  # the file of a process that has just ended
    else:
        raise BlockingIOError(f"other processes are writing {target} right now: wait for them, or end them")
    try:
        yield
    finally:
        lock.release()


def _claim(partial: Path) -> None:
    """Makes the folder beside the target; FileExistsError if something else has its name."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise FileExistsError(f"{partial} must be a folder, in which unfinished work is kept: move what is there away")
    partial.mkdir(parents=True, exist_ok=True)
    names = {entry.name for entry in os.scandir(partial)}
    if links := [entry.name for entry in os.scandir(partial) if entry.is_symlink()]:
        raise FileExistsError(
            f"{partial} holds {min(links)}, a link, and nothing is written through links: move it away"
        )
    if names and (surplus := names - _NAMES or ({"lock"} - names and names)):
        raise FileExistsError(
            f"{partial} holds {min(surplus)}, which is nothing that an unfinished conversion leaves: move it away"
        )


def _tidy(partial: Path) -> None:
    """Removes the folder beside the target if nothing in it is needed; last the lock, which others wait for."""
    if not partial.is_dir() or (partial / "old").exists() or any((partial / "content").glob("*")):
        return
    shutil.rmtree(partial / "content", ignore_errors=True)
    with suppress(OSError):  # another process has started over
        for name in ("plan.json", "plan.tmp", "journal", "lock"):
            (partial / name).unlink(missing_ok=True)
        partial.rmdir()


def _restore(partial: Path, target: Path, guard: Guard) -> None:
    """Cleans up after a process that was killed while it replaced the target."""
    if not (partial / "old").exists():
        return
    if not (partial / "content").exists():  # the new one was in place
        _discard_old(partial, target, guard)
    elif os.path.lexists(target):  # something else has been put there
        _keep_old(partial, target, "it was to be replaced by a conversion that did not end")
    else:
        os.rename(partial / "old", target)


def _begin(partial: Path, plan: Mapping[str, Any]) -> None:
    for name in ("journal", "plan.json"):
        (partial / name).unlink(missing_ok=True)
    shutil.rmtree(partial / "content", ignore_errors=True)
    temporary = partial / "plan.tmp"
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(plan, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, partial / "plan.json")


def _replace(partial: Path, target: Path) -> None:
    """Renames the content to the target; what it replaces is moved away first, and back if that fails."""
    content, old = partial / "content", partial / "old"
    try:
        if target.is_dir() and any(target.iterdir()):
            os.rename(target, old)
        os.rename(content, target)
    except BaseException as error:
        if old.exists() and not os.path.lexists(target):
            try:
                os.rename(old, target)
            except OSError:
                raise OSError(f"{target} could not be replaced ({error}); what was there is now {old}") from error
        elif old.exists() and content.exists():
            _keep_old(partial, target, "something else has replaced it")
        raise
    _sync_folder(target.parent)


def _discard_old(partial: Path, target: Path, guard: Guard) -> None:
    """Removes what the target has replaced, unless it now holds something that must not be lost."""
    old = partial / "old"
    if not os.path.lexists(old):
        return
    try:
        guard.check_contents(old)
    except (ValueError, OSError) as error:
        _keep_old(partial, target, str(error))
    else:
        shutil.rmtree(old, ignore_errors=True)


def _keep_old(partial: Path, target: Path, why: str) -> None:
    names = (target.with_name(f"{target.name}.old{number or ''}") for number in range(_MOST_TRIES))
    kept = next((name for name in names if not os.path.lexists(name)), partial / "old")
    if kept != partial / "old":
        os.rename(partial / "old", kept)
    warnings.warn(f"what was at {target} is kept as {kept}: {why}", stacklevel=2)


def _sync_folders(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        _sync_folder(Path(folder))


def _sync_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # Windows has no such thing
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _told_when_full(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, DiskFullError) or error.errno not in _FULL:
            raise
        raise DiskFullError(
            f"no room for all of {target} ({os.strerror(error.errno)}): nothing that could be loaded has been left "
            "there; make room and run the same again, which continues where this stopped"
        ) from error
