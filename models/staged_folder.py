"""A folder that appears whole or not at all, and whose making goes on where it was interrupted.

Beside the target `name` a folder `.name.partial` is filled: `content`, which becomes the target by one rename at the
end; `plan.json`, what is being made; and `journal`, the names of the pieces that are on the disk for good. A process
that is killed leaves it there, and the next one with the same plan goes on; one with another plan begins anew.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

JOURNAL_BYTES = 2**26  # written before it is made sure that they are on the disk, and noted

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no space, none for this user, a file too large


class DiskFullError(OSError):
    """There is no room for what is to be written."""


class StagedFolder:
    """What is being made; `content` is the folder to write into, `done` the pieces that an earlier process wrote."""

    def __init__(self, partial: Path) -> None:
        self.content = partial / "content"
        self._journal = partial / "journal"
        lines = self._journal.read_text(encoding="utf-8").split("\n") if self._journal.is_file() else [""]
        self.done = frozenset(lines[:-1])  # the last is empty, or was cut off
        with self._journal.open("w", encoding="utf-8") as stream:
            stream.writelines(f"{line}\n" for line in lines[:-1])
        self._pending: list[str] = []
        self._pending_bytes = 0

    def note(self, piece: str, num_bytes: int, sync: Callable[[], None]) -> None:
        """A piece has been written. `sync` makes sure that all that was noted is on the disk; called now and then."""
        self._pending.append(piece)
        self._pending_bytes += num_bytes
        if self._pending_bytes >= JOURNAL_BYTES:
            self.flush(sync)

    def flush(self, sync: Callable[[], None]) -> None:
        """Makes sure that what was noted is never written again."""
        sync()
        with self._journal.open("a", encoding="utf-8") as stream:
            stream.writelines(f"{piece}\n" for piece in self._pending)
            stream.flush()
            os.fsync(stream.fileno())
        self._pending, self._pending_bytes = [], 0

    def write_file(self, name: str, content: bytes) -> None:
        """A small file, on the disk at once and whole."""
        file = self.content / name
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.tmp")
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)

    def require(self, num_bytes: int) -> None:
        """Raises DiskFullError, before anything is written, where so many bytes have no room."""
        free = shutil.disk_usage(self.content).free
        if num_bytes > free:
            raise DiskFullError(
                f"{num_bytes:,} bytes are still to be written and {free:,} are free where {self._target} shall stand: "
                "make room, or choose another place"
            )

    @property
    def _target(self) -> str:
        return self.content.parent.name.removeprefix(".").removesuffix(".partial")


def forget_partial(target: Path) -> None:
    """Removes what a process has left beside a finished target that was ended right after the renaming."""
    partial = target.with_name(f".{target.name}.partial")
    if partial.is_dir() and not (partial / "content").exists():
        shutil.rmtree(partial, ignore_errors=True)


def same_plan(file: Path, plan: Mapping[str, Any]) -> bool:
    """Whether a JSON file says exactly this."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) == plan
    except (OSError, ValueError):
        return False


@contextmanager
def staged(target: Path, plan: Mapping[str, Any], *, overwrite: bool, resume: bool = True) -> Iterator[StagedFolder]:
    """A folder to fill, which becomes `target` when the block ends without an error.

    plan: what is being made, as JSON; what an earlier process has begun is gone on with only if it is the same.
    overwrite: replace a target that is there; it stays until the new one is whole.
    resume: whether the same plan stands for the same bytes.
    Raises FileExistsError for a target that is there, BlockingIOError while another process fills it, DiskFullError.
    """
    partial = target.with_name(f".{target.name}.partial")
    old = partial / "old"
    if old.is_dir() and not target.exists():  # ended between the two renames of `_replace`
        os.rename(old, target)
    if not overwrite and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} is there already and is something else: choose another name, or overwrite it")
    with _told_when_full(target):
        partial.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(partial / "lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise BlockingIOError(f"another process is writing {target} right now: wait for it, or end it") from None
        try:
            if not resume or not same_plan(partial / "plan.json", plan):
                _begin(partial, plan)
            (partial / "content").mkdir(exist_ok=True)
            yield StagedFolder(partial)
            _sync_folders(partial / "content")
            _replace(partial / "content", target)
        finally:
            lock.release()
            if not any((partial / "content").glob("*")):  # it is the target now, or nothing was begun
                shutil.rmtree(partial)


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


def _replace(content: Path, target: Path) -> None:
    """The moment at which the target is there; one that it replaces is moved away first, and then removed."""
    old = content.with_name("old")
    shutil.rmtree(old, ignore_errors=True)
    if target.is_dir() and any(target.iterdir()):
        os.rename(target, old)
    elif target.is_file():
        target.unlink()
    os.rename(content, target)
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


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
            "there; make room and run the same again, which goes on where this stopped"
        ) from error
