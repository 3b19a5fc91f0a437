"""Ends the command on Ctrl-C or SIGTERM, whatever runs.

Python raises KeyboardInterrupt only between two instructions of the main thread: not while XLA compiles or runs a loop,
for minutes. And it may raise it inside a callback, where exceptions are dropped. So nothing is raised here. Python's
handler in C writes the signal's number into a socket even then; a thread reads it there, and ends the process with
`os._exit`: an ordinary exit would free XLA's data while threads still use it, and crash. Files stay intact: those of
decodax are replaced once their successors are complete.

Work that no file holds yet (the steps of a training) may be given time to be saved: `unsaved`. A second signal still
ends the process at once. Signals that are ignored when the command starts (`nohup`, jobs in the background of a script)
stay ignored.
"""

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
from typing import NoReturn

INTERRUPTED = 128 + signal.SIGINT  # an exit code, as shells count them
_SAVING_SECONDS = {signal.SIGINT: 1.5, signal.SIGTERM: 30.0}  # a user waits after Ctrl-C; the sender of SIGTERM may not
_FLUSHING_SECONDS = 0.2  # a full pipe that nobody reads would block it for ever
_LOST = b"stopped before the last steps were saved: the same command goes on from its last checkpoint\n"
_SHOW_CURSOR = b"\x1b[?25h"  # a progress display hides it

_received: list[int] = []
_unsaved = threading.Event()


def install() -> None:
    """Watches for both signals from now on, where they would end the process and this is its main thread."""
    usual = (signal.SIG_DFL, signal.default_int_handler)
    handled = [number for number in _SAVING_SECONDS if signal.getsignal(number) in usual]
    if not handled or threading.current_thread() is not threading.main_thread() or os.name == "nt":
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    try:
        threading.Thread(target=_watch, args=(reader, writer), name="interrupts", daemon=True).start()
    except RuntimeError:  # no thread can be started: KeyboardInterrupt is better than nothing
        return
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for number in handled:
        signal.signal(number, lambda *_: None)
    atexit.register(_ignore, handled)  # the first to be registered runs last


def _ignore(numbers: list[signal.Signals]) -> None:
    """Ignores the signals while Python shuts down: one would end a successful run as a failed one."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def unsaved(steps: int) -> None:
    """Tells how many steps of work an end right now would lose; if there are any, the end waits a moment."""
    (_unsaved.set if steps else _unsaved.clear)()


def leave_if_asked(code: int | str | None = None) -> None:
    """Ends the process here if a signal has come; a run that stops by itself, such as a training, ends this way."""
    if _received or code == INTERRUPTED:
        _leave(128 + _received[0] if _received else INTERRUPTED)


def _watch(reader: socket.socket, writer: socket.socket) -> None:
    """Runs in the thread; it keeps both ends of the socket open."""
    while not _received:
        _received.extend(number for number in reader.recv(64) if number in _SAVING_SECONDS)
    first = _received[0]
    if _unsaved.is_set() and len(_received) == 1:
        reader.settimeout(_SAVING_SECONDS[signal.Signals(first)])
        with contextlib.suppress(TimeoutError):
            reader.recv(1)
    _leave(128 + first)


def _leave(code: int) -> NoReturn:
    """Leaves the terminal as it was found, writes what was printed, and ends the process without any clean-up."""
    flushing = threading.Thread(target=_flush, daemon=True)
    with contextlib.suppress(RuntimeError):
        flushing.start()
        flushing.join(_FLUSHING_SECONDS)
    with contextlib.suppress(OSError):
        if os.isatty(2):  # the next output, such as the shell's prompt, begins a line
            os.write(2, b"\n" if os.environ.get("TERM") == "dumb" else _SHOW_CURSOR + b"\n")
        if _unsaved.is_set():
            os.write(2, _LOST)
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
