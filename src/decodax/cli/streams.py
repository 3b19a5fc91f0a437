"""Makes the standard streams safe to write to: closed ones, readers that go away, full disks, characters they lack.

Code that prints need not handle any of it, be it decodax, Typer or Rich, which each had an answer of their own.

A character that a stream's encoding lacks is written as an escape like \\u4f60: the encoding is what the user's locale
or PYTHONIOENCODING asks for, so UTF-8 would not be read as such, and a question mark would lose the character.
"""

import contextlib
import io
import os
import sys
from typing import Any

_NARROWEST = 20  # characters in a line of a terminal
READER_GONE = 141  # as shells count it: 128 + SIGPIPE


class _Output(io.FileIO):
    """A file that remembers its first write error, even where the error is caught."""

    problem: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.problem = self.problem or error
            raise


class _Messages(io.FileIO):
    """A file for messages and progress: its write errors are ignored, so that work does not end."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare() -> None:
    """Prepares the streams; to be called first, before anything opens a file or prints."""
    stdout_is_open = sys.stdout is not None
    _reserve_numbers()
    width = os.environ.get("COLUMNS", "")
    if not (width.isdecimal() and int(width) >= _NARROWEST):
        os.environ.pop("COLUMNS", None)  # 0, say, from some job runners: Rich would print nothing at all
    if os.name != "nt":  # its consoles are no files
        sys.stdout = _over(_Output(1, "w", closefd=False), sys.stdout)
        sys.stderr = _over(_Messages(2, "w", closefd=False), sys.stderr)
    if not stdout_is_open:
        print("warning: stdout is closed: what is printed there is lost", file=sys.stderr)


def finish(code: int | str | None) -> int | str | None:
    """Writes the rest and returns the exit code of the process: another one where stdout could not be written."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    problem = _stdout_problem()
    if problem is None:
        return code
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the flush at exit does not fail again
    if isinstance(problem, BrokenPipeError):
        return READER_GONE
    print(f"error: stdout cannot be written: {problem.strerror}", file=sys.stderr)
    return 1


def is_of_stdout(error: BaseException) -> bool:
    """Whether an error says that stdout cannot be written, which `finish` reports."""
    return error is _stdout_problem()


def _stdout_problem() -> OSError | None:
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.problem if isinstance(raw, _Output) else None


def _reserve_numbers() -> None:
    """Opens closed standard streams as the null device.

    Otherwise the next file to be opened, such as weights, would get the number of one, and libraries print into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one


def _over(raw: io.FileIO, stream: Any) -> io.TextIOWrapper:
    """A text stream like the given one, or in UTF-8 where that is None."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    buffered = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffered, encoding, "backslashreplace", line_buffering=raw.isatty() or raw.fileno() == 2)
