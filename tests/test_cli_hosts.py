"""Options of commands over several processes, and how a process leaves the others."""

from typing import Any

import jax
import pytest
import typer
from typer.testing import CliRunner

from decodax.cli import hosts, session
from decodax.cli.app import app
from decodax.sharding import distributed


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["generate", "x", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-processes", "2"], "go with --distributed"),
        (["--process-id", "0"], "go with --distributed"),
        (["--distributed", "host:1", "--num-processes", "2", "--process-id", "1"], "needs --mesh"),
        (
            ["--mesh", "data=2", "--distributed", "host:1", "--num-processes", "2", "--process-id", "2"],
            "must be in 0..1",
        ),
        (["--mesh", "data=2", "--distributed", "host:1", "--num-processes", "2"], "leave open process_id"),
        (["--mesh", "data=2", "--distributed", "host:x", "--num-processes", "2", "--process-id", "0"], "HOST:PORT"),
    ],
)
def test_meaningless_values_are_usage_errors(arguments: list[str], message: str):
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.output


def test_initialized_jax_cannot_join_a_rendezvous():
    """Before waiting for others, which would wait for this process."""
    jax.devices()
    with pytest.raises(RuntimeError, match="joined before JAX looks for devices"):
        distributed.start("127.0.0.1:1", num_processes=2, process_id=1, timeout_seconds=1.0, environ={})
    distributed.start("127.0.0.1:1", num_processes=1, process_id=0, environ={})  # nothing to join


def test_an_environment_without_a_cluster_is_an_error(monkeypatch: pytest.MonkeyPatch):
    def initialize(**_: Any) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match=r"nothing in the environment says.*DECODAX_COORDINATOR"):
        distributed.start(environ={})


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("x"), 1), (KeyboardInterrupt(), 130), (BrokenPipeError(), 141)]
)
def test_a_failing_process_of_several_exits_at_once(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    codes: list[int] = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "leave_at_once", codes.append)
    monkeypatch.setattr(session.os, "dup2", lambda *_: None)  # the reader of this test's output stays
    with pytest.raises(typer.Exit), session.reported_errors(False):
        raise error
    assert codes == [code]
    if code == 1:
        assert capfd.readouterr().err == "error: process 0 of 1: x\n"


def test_a_process_without_others_is_not_prefixed():
    assert hosts.error_prefix() == ""
