"""Processes find each other at the rendezvous; threads stand in for processes."""

import json
import socket
import threading
import time

import pytest

from decodax.sharding.rendezvous import Hello, meet
from tests.processes import free_port

LOOPBACK = "127.0.0.1"


def outcomes(*hellos: Hello, seconds: float = 20.0, port: int | None = None) -> list[Exception | None]:
    """The outcome of `meet` in each process, run concurrently; None where it found all."""
    address = (LOOPBACK, port or free_port())
    results: list[Exception | None] = [None] * len(hellos)

    def attend(place: int) -> None:
        try:
            meet(address, hellos[place], seconds)
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=attend, args=(place,)) for place in range(len(hellos))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def process(index: int, of: int = 3, host: str | None = None, versions: str = "decodax 1, jax 2") -> Hello:
    return Hello(index, of, host or f"host{index}", versions)


def test_all_processes_meet():
    assert outcomes(process(2), process(0), process(1)) == [None, None, None]


def test_a_single_process_does_not_wait():
    meet((LOOPBACK, 1), process(0, of=1), 0.0)


def test_missing_processes_are_named_to_the_others():
    port = free_port()
    errors = outcomes(process(0, of=5), process(3, of=5), seconds=1.5, port=port)
    for error in errors:
        assert isinstance(error, TimeoutError)
        message = f"2 of 5 processes came to 127.0.0.1:{port} within 1.5 s; missing: 1, 2, 4. Check that"
        assert message in str(error)


def test_process_zero_never_comes():
    port = free_port()
    (error,) = outcomes(process(2), seconds=0.5, port=port)
    assert isinstance(error, TimeoutError)
    assert f"process 2 (host2) waited 0.5 s for process 0 at 127.0.0.1:{port} ([Errno 111]" in str(error)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (process(1, host="b"), "needs an id of its own in 0..2, but 1 came twice, from {0} and from {1}"),
        (process(2, of=4), "process 0 (host0) was told 3, process 2 (host2) 4"),
        (process(2, versions="decodax 1, jax 3"), "process 2 (host2) has decodax 1, jax 3"),
    ],
)
def test_processes_that_do_not_fit_are_named_to_all(second: Hello, message: str):
    # A process that comes too late gets no message, hence the seconds.
    errors = outcomes(process(0), process(1, host="a"), second, seconds=3.0)
    texts = [message.format("a", "b"), message.format("b", "a")]
    named = [error for error in errors if isinstance(error, ValueError)]
    assert named[0] is errors[0] and any(text in str(named[0]) for text in texts)
    assert isinstance(errors[2], ValueError)


def test_a_port_in_use_is_named():
    with socket.create_server((LOOPBACK, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen on port {port} of host0 \(Address already in use\)"):
            meet((LOOPBACK, port), process(0), 5.0)


def test_foreign_connections_and_processes_that_leave_are_not_counted():
    port = free_port()
    results: list[list[Exception | None]] = []
    thread = threading.Thread(target=lambda: results.append(outcomes(process(0, 4), process(1, 4), port=port)))
    thread.start()
    leaver = json.dumps({"process_id": 2, "num_processes": 4, "host": "x", "versions": "decodax 1, jax 2"}).encode()
    for line in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process_id": "2"}\n', b"\xff" * 9000, leaver + b"\n"):
        connection = _connected(port)
        connection.sendall(line)
        time.sleep(0.1)
        connection.close()
    # Had the one that left been counted, process 2 would be one too many.
    assert outcomes(process(3, 4), process(2, 4), port=port) == [None, None]
    thread.join(30)
    assert results == [[None, None]]


def test_another_program_at_the_address_is_no_coordinator():
    with socket.create_server((LOOPBACK, 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\n")

        thread = threading.Thread(target=answer)
        thread.start()
        port = other.getsockname()[1]
        thread_error = outcomes(process(1), seconds=0.1, port=port)
        thread.join(10)
    assert "something else, or a run that has begun, answers there" in str(thread_error[0])


def _connected(port: int) -> socket.socket:
    for _ in range(100):
        try:
            return socket.create_connection((LOOPBACK, port), timeout=5)
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise AssertionError("process 0 never listened")
