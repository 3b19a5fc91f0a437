"""Writes answers in JSON lines as they come, and in order at the end; interrupted, it goes on where it was.

Until all answers are there they stand in `name.partial`, after a line that says which run they are of. What a process
that was killed left there counts, but for a last line without an end.
"""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from decodax.core.printable import printable

_RUN = "run"


class AnswerFile:
    """The answers of one run.

    done: the indices of the answers that are written.
    """

    def __init__(self, path: Path, run: str) -> None:
        """Opens the file of this run, or a new one.

        run: the same text for the same input, model and options.
        Raises ValueError for a file that is complete, or of another run.
        """
        self._path, self._partial = path, path.with_name(f"{path.name}.partial")
        self._places: dict[int, tuple[int, int]] = {}
        if path.is_dir():
            raise ValueError(f"{printable(path)} is a folder: name a file in it")
        if not self._partial.exists():
            if path.exists():
                raise ValueError(f"{printable(path)} exists already: name another file, or remove it")
            if not path.parent.is_dir():
                raise ValueError(f"{printable(path.parent)} is no folder: make it, or name another place")
            self._partial.write_text(json.dumps({_RUN: run}) + "\n", "utf-8")
        self._file = self._partial.open("ab")
        try:
            _lock(self._file, self._partial)
            self._end = self._read(run)
            self._file.truncate(self._end)
        except BaseException:
            self._file.close()
            raise

    @property
    def done(self) -> set[int]:
        return set(self._places)

    def add(self, index: int, answer: dict[str, Any]) -> None:
        """Writes an answer; OSError, saying what is kept, where there is no room."""
        content = json.dumps({"index": index, **answer}, allow_nan=False).encode() + b"\n"
        try:
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"{printable(self._partial)} cannot be written: {error.strerror}. The answers before are kept there: "
                "make room, and give the same command again"
            ) from error
        self._places[index] = self._end, len(content)
        self._end += len(content)

    def finish(self) -> None:
        """Writes the answers in their order, all at once, in place of the partial file."""
        whole = self._path.with_name(f"{self._path.name}.whole")
        with self._partial.open("rb") as source, whole.open("wb") as target:
            for index in sorted(self._places):
                start, size = self._places[index]
                source.seek(start)
                target.write(source.read(size))
            target.flush()
            os.fsync(target.fileno())
        whole.replace(self._path)
        self._partial.unlink()
        self.close()

    def close(self) -> None:
        self._file.close()

    def _read(self, run: str) -> int:
        """Finds the answers that are there; gives the length of what is whole."""
        end = 0
        with self._partial.open("rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    if number == 0:
                        if entry[_RUN] != run:
                            raise ValueError(
                                f"{printable(self._partial)} belongs to another input, model or options: give the "
                                "command that began it, or remove the file"
                            )
                    else:
                        self._places[entry["index"]] = end, len(line)
                except (TypeError, KeyError, json.JSONDecodeError) as error:
                    raise ValueError(
                        f"{printable(self._partial)}, line {number + 1}, is no answer that this program wrote: remove "
                        "the file to begin anew"
                    ) from error
                end += len(line)
        if end == 0:
            self._partial.write_text(json.dumps({_RUN: run}) + "\n", "utf-8")
            end = self._partial.stat().st_size
        return end


def _lock(file: BinaryIO, path: Path) -> None:
    """Raises ValueError where another process has the file; a lock ends with its process."""
    try:
        import fcntl
    except ImportError:  # Windows, where there is no such lock
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"another process writes {printable(path)}: wait for it, or name another file") from error
