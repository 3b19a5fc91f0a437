"""A roll call before JAX starts over several processes: who is there, and who is not, told to everyone.

JAX's own start waits for processes that never come, and then aborts the process with a stack trace that names neither
the address nor who is missing (seen with 0.10.2 and 0.12.0). So the processes first meet here, at the same address:
process 0 listens, the others connect (again and again, until it is up) and say who they are, and all hear one verdict.
It finds what JAX would not, too: two processes of one id, disagreement about how many there are, different versions.

The protocol is a line of JSON each way over TCP. Nothing that comes in is trusted to be one of ours.
"""

import contextlib
import json
import os
import selectors
import socket
import time
from dataclasses import asdict, dataclass
from typing import Any

_MAX_LINE_BYTES = 4096
_RETRY_SECONDS = 0.2
_GRACE_SECONDS = 5.0  # for a verdict to arrive that falls at the very end of process 0's patience


@dataclass(frozen=True)
class Greeting:
    """What a process says of itself. versions: what must be the same everywhere."""

    process_id: int
    num_processes: int
    host: str
    versions: str


def call_roll(address: tuple[str, int], greeting: Greeting, timeout_seconds: float) -> None:
    """Returns once all processes have met at `address`.

    Raises TimeoutError, naming the address and those missing, when they have not within the time; ValueError when two
    say the same id, or disagree on their number or versions; OSError when process 0 cannot listen there.
    """
    if greeting.num_processes > 1:
        deadline = time.monotonic() + timeout_seconds
        (_host if greeting.process_id == 0 else _attend)(address, greeting, deadline, timeout_seconds)


def _host(address: tuple[str, int], greeting: Greeting, deadline: float, timeout_seconds: float) -> None:
    with _listen(address, greeting) as listener, contextlib.ExitStack() as stack:
        lines, roll = _Lines(listener, stack), _Roll(greeting)
        error: Exception | None = None
        while error is None and len(roll.present) < greeting.num_processes:
            left = deadline - time.monotonic()
            if left <= 0:
                error = TimeoutError(_missing(address, roll.present, greeting.num_processes, timeout_seconds))
            for connection, line in lines.wait(max(left, 0)):
                error = error or roll.hear(connection, line)
        listener.close()  # JAX's coordinator is to listen there next
        roll.tell(error)
    if error is not None:
        raise error


class _Roll:
    """Those who are there, and the connections on which they wait for the verdict."""

    def __init__(self, own: Greeting) -> None:
        self.own, self.present = own, {own.process_id: own}
        self.waiting: dict[socket.socket, int | None] = {}  # None: one that does not fit, and is to hear why

    def hear(self, connection: socket.socket, line: bytes | None) -> ValueError | None:
        """Takes a process in, or out when it went away (perhaps to be started again); says what does not fit."""
        if line is None:
            index = self.waiting.pop(connection, None)
            if index is not None:
                del self.present[index]
            return None
        other = _read(line)
        if other is None:
            return None
        error = _disagreement(self.own, other, self.present)
        self.waiting[connection] = None if error else other.process_id
        if error is None:
            self.present[other.process_id] = other
        return error

    def tell(self, error: Exception | None) -> None:
        """The verdict, to all who wait."""
        verdict = json.dumps({"error": None if error is None else str(error), "kind": type(error).__name__})
        for connection in self.waiting:
            with contextlib.suppress(OSError):
                connection.sendall(verdict.encode() + b"\n")


def _listen(address: tuple[str, int], greeting: Greeting) -> socket.socket:
    host, port = address
    both = socket.has_dualstack_ipv6()
    try:
        if is_loopback(host):
            return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(
            f"process 0 cannot listen on port {port} of {greeting.host} ({why}): another program, an earlier run or a "
            "second process 0 may use it. Choose another port for the coordinator, the same for all processes"
        ) from error


def is_loopback(host: str) -> bool:
    """Whether the address only reaches the machine itself, so that nobody else need be listened to."""
    return host in ("localhost", "::1") or host.startswith("127.")


class _Lines:
    """One line from each connection to a listener."""

    def __init__(self, listener: socket.socket, stack: contextlib.ExitStack) -> None:
        self.listener, self.stack = listener, stack
        self.selector = stack.enter_context(selectors.DefaultSelector())
        self.selector.register(listener, selectors.EVENT_READ)
        self.received: dict[socket.socket, bytes] = {}

    def wait(self, seconds: float) -> list[tuple[socket.socket, bytes | None]]:
        """New lines, and None for connections that ended."""
        found: list[tuple[socket.socket, bytes | None]] = []
        for key, _ in self.selector.select(seconds):
            if key.fileobj is self.listener:
                self._accept()
                continue
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            try:
                piece = connection.recv(_MAX_LINE_BYTES)
            except OSError:
                piece = b""
            before = self.received[connection]
            self.received[connection] = line = before + piece
            if not piece or b"\n" in before or len(line) > _MAX_LINE_BYTES:  # gone, or saying more than it should
                self.selector.unregister(connection)
                connection.close()
                found.append((connection, None))
            elif b"\n" in line:
                found.append((connection, line))
        return found

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # whoever it was has gone again
            connection = self.stack.enter_context(self.listener.accept()[0])
            connection.setblocking(False)
            self.received[connection] = b""
            self.selector.register(connection, selectors.EVENT_READ)


def _read(line: bytes) -> Greeting | None:
    """The greeting in a line; None for what is none, as anybody may connect to an open port."""
    try:
        greeting = Greeting(**json.loads(line))
    except (ValueError, TypeError):
        return None
    numbers = (greeting.process_id, greeting.num_processes)
    texts = (greeting.host, greeting.versions)
    fits = all(type(item) is int for item in numbers) and all(type(item) is str for item in texts)
    return greeting if fits else None


def _disagreement(own: Greeting, other: Greeting, present: dict[int, Greeting]) -> ValueError | None:
    """What makes the other one no partner of this process."""
    if other.num_processes != own.num_processes:
        return ValueError(
            f"all processes must be told how many there are: process 0 ({own.host}) was told {own.num_processes}, "
            f"process {other.process_id} ({other.host}) {other.num_processes}"
        )
    if other.process_id in present:
        return ValueError(
            f"each process needs an id of its own in 0..{own.num_processes - 1}, but {other.process_id} came twice, "
            f"from {present[other.process_id].host} and from {other.host}"
        )
    if other.versions != own.versions:
        return ValueError(
            f"all processes must run the same versions: process 0 ({own.host}) has {own.versions}, process "
            f"{other.process_id} ({other.host}) has {other.versions}"
        )
    return None


def _missing(address: tuple[str, int], present: dict[int, Greeting], num_processes: int, seconds: float) -> str:
    absent = [str(index) for index in range(num_processes) if index not in present]
    named = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
    return (
        f"{len(present)} of {num_processes} processes came to {_name(address)} within {seconds:g} s; missing: "
        f"{named}. Check that they were started (their own logs say why not), with this address and number of "
        "processes, and that a firewall lets them reach this port"
    )


def _attend(address: tuple[str, int], greeting: Greeting, deadline: float, timeout_seconds: float) -> None:
    problem: Exception | str = "not tried"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=left) as connection:
                connection.sendall(json.dumps(asdict(greeting)).encode() + b"\n")
                # Process 0 has been waiting already, so its patience ends first; then it says who was missing.
                connection.settimeout(timeout_seconds + _GRACE_SECONDS)
                verdict = _receive_verdict(connection)
        except OSError as error:
            verdict, problem = None, error
        else:
            problem = "something else, or a run that has begun, answers there"
        if verdict is not None:
            return _obey(verdict)
        time.sleep(min(_RETRY_SECONDS, max(deadline - time.monotonic(), 0)))
    raise TimeoutError(
        f"process {greeting.process_id} ({greeting.host}) waited {timeout_seconds:g} s for process 0 at "
        f"{_name(address)} ({problem}). Check that process 0 was started, on the machine of that name, with the same "
        "address, and that a firewall lets this machine reach that port"
    )


def _receive_verdict(connection: socket.socket) -> dict[str, Any] | None:
    """What process 0 has decided; None when it hung up, or is not one of ours."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 2 * _MAX_LINE_BYTES:
        piece = connection.recv(_MAX_LINE_BYTES)
        if not piece:
            break
        line += piece
    try:
        verdict = json.loads(line)
    except ValueError:
        return None
    return verdict if isinstance(verdict, dict) and verdict.keys() == {"error", "kind"} else None


def _obey(verdict: dict[str, Any]) -> None:
    if verdict["error"] is not None:
        raise (TimeoutError if verdict["kind"] == "TimeoutError" else ValueError)(verdict["error"])


def _name(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
