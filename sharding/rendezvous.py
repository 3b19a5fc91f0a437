"""Runs a rendezvous of all processes before JAX starts, so that each one learns which processes are missing.

JAX's own start waits for processes that never come, and then aborts with a stack trace that names neither the address
nor the missing processes (seen with 0.10.2 and 0.12.0). So the processes first meet here, at the same address: process
0, the coordinator, listens; the others connect (with retries until it is up) and send a hello message; all get one
verdict. It also finds what JAX does not: two processes with one id, different numbers of processes, different versions.

The protocol is a line of JSON each way over TCP. No received line is trusted to come from a decodax process.
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
_GRACE_SECONDS = 5.0  # for a verdict sent just before the coordinator's time-out to arrive


@dataclass(frozen=True)
class Hello:
    """The hello message of a process.

    process_id: its id.
    num_processes: how many processes it expects.
    host: its host name.
    versions: of decodax and JAX; must be the same everywhere.
    """

    process_id: int
    num_processes: int
    host: str
    versions: str


def meet(address: tuple[str, int], hello: Hello, timeout_seconds: float) -> None:
    """Returns once all processes have met at `address`.

    Raises TimeoutError, naming the address and the missing processes, when they have not met within the time-out.
    Raises ValueError when two processes have the same id, or different numbers of processes or versions.
    Raises OSError when process 0 cannot listen there.
    """
    if hello.num_processes > 1:
        deadline = time.monotonic() + timeout_seconds
        (_coordinate if hello.process_id == 0 else _join)(address, hello, deadline, timeout_seconds)


def _coordinate(address: tuple[str, int], hello: Hello, deadline: float, timeout_seconds: float) -> None:
    with _listen(address, hello) as listener, contextlib.ExitStack() as stack:
        lines, rendezvous = _Lines(listener, stack), _Rendezvous(hello)
        error: Exception | None = None
        while error is None and len(rendezvous.present) < hello.num_processes:
            left = deadline - time.monotonic()
            if left <= 0:
                error = TimeoutError(_missing(address, rendezvous.present, hello.num_processes, timeout_seconds))
            for connection, line in lines.wait(max(left, 0)):
                error = error or rendezvous.receive(connection, line)
        listener.close()  # JAX's own coordinator listens there next
        rendezvous.send_verdict(error)
    if error is not None:
        raise error


class _Rendezvous:
    """The processes that have arrived, and the connections on which they wait for the verdict."""

    def __init__(self, own: Hello) -> None:
        self.own, self.present = own, {own.process_id: own}
        self.waiting: dict[socket.socket, int | None] = {}  # None: a process that does not fit; it gets the error

    def receive(self, connection: socket.socket, line: bytes | None) -> ValueError | None:
        """Adds a process by its hello message, or removes a disconnected one; returns an error if it does not fit."""
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

    def send_verdict(self, error: Exception | None) -> None:
        """Sends the verdict to all processes that wait."""
        verdict = json.dumps({"error": None if error is None else str(error), "kind": type(error).__name__})
        for connection in self.waiting:
            with contextlib.suppress(OSError):
                connection.sendall(verdict.encode() + b"\n")


def _listen(address: tuple[str, int], hello: Hello) -> socket.socket:
    host, port = address
    both = socket.has_dualstack_ipv6()
    try:
        if is_loopback(host):
            return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(
            f"process 0 cannot listen on port {port} of {hello.host} ({why}): another program, an earlier run or a "
            "second process 0 may use it. Choose another port for the coordinator, the same for all processes"
        ) from error


def is_loopback(host: str) -> bool:
    """Whether the address only reaches this machine, so that listening on other interfaces is not needed."""
    return host in ("localhost", "::1") or host.startswith("127.")


class _Lines:
    """Reads one line from each connection to a listener."""

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
            if not piece or b"\n" in before or len(line) > _MAX_LINE_BYTES:  # closed, or more than one line
                self.selector.unregister(connection)
                connection.close()
                found.append((connection, None))
            elif b"\n" in line:
                found.append((connection, line))
        return found

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the connection was closed again
            connection = self.stack.enter_context(self.listener.accept()[0])
            connection.setblocking(False)
            self.received[connection] = b""
            self.selector.register(connection, selectors.EVENT_READ)


def _read(line: bytes) -> Hello | None:
    """The hello message in a line; None for anything else, as any program may connect to an open port."""
    try:
        hello = Hello(**json.loads(line))
    except (ValueError, TypeError):
        return None
    numbers = (hello.process_id, hello.num_processes)
    texts = (hello.host, hello.versions)
    fits = all(type(item) is int for item in numbers) and all(type(item) is str for item in texts)
    return hello if fits else None


def _disagreement(own: Hello, other: Hello, present: dict[int, Hello]) -> ValueError | None:
    """The error if the other process cannot run with this one; None if it can."""
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


def _missing(address: tuple[str, int], present: dict[int, Hello], num_processes: int, seconds: float) -> str:
    absent = [str(index) for index in range(num_processes) if index not in present]
    named = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
    return (
        f"{len(present)} of {num_processes} processes came to {_name(address)} within {seconds:g} s; missing: "
        f"{named}. Check that they were started (their own logs say why not), with this address and number of "
        "processes, and that a firewall lets them reach this port"
    )


def _join(address: tuple[str, int], hello: Hello, deadline: float, timeout_seconds: float) -> None:
    problem: Exception | str = "not tried"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=left) as connection:
                connection.sendall(json.dumps(asdict(hello)).encode() + b"\n")
                # The coordinator has waited longer, so its time-out comes first; then it sends who is missing.
                connection.settimeout(timeout_seconds + _GRACE_SECONDS)
                verdict = _receive_verdict(connection)
        except OSError as error:
            verdict, problem = None, error
        else:
            problem = "something else, or a run that has begun, answers there"
        if verdict is not None:
            return _raise_error_of(verdict)
        time.sleep(min(_RETRY_SECONDS, max(deadline - time.monotonic(), 0)))
    raise TimeoutError(
        f"process {hello.process_id} ({hello.host}) waited {timeout_seconds:g} s for process 0 at "
        f"{_name(address)} ({problem}). Check that process 0 was started, on the machine of that name, with the same "
        "address, and that a firewall lets this machine reach that port"
    )


def _receive_verdict(connection: socket.socket) -> dict[str, Any] | None:
    """The coordinator's verdict; None when it disconnected, or another program answered."""
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


def _raise_error_of(verdict: dict[str, Any]) -> None:
    if verdict["error"] is not None:
        raise (TimeoutError if verdict["kind"] == "TimeoutError" else ValueError)(verdict["error"])


def _name(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
