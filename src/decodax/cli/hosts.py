"""Runs a command over several processes: its options, the rendezvous, and output from process 0 alone."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Annotated

import jax
import typer

from decodax.sharding import distributed

Coordinator = Annotated[
    str | None,
    typer.Option(
        "--distributed",
        metavar="auto|HOST:PORT",
        help="Run over several processes, each started with this command: where process 0 listens, or auto to read "
        "it from SLURM, Kubernetes (JobSet, LeaderWorkerSet), a TPU slice or DECODAX_COORDINATOR.",
    ),
]
NumProcesses = Annotated[int | None, typer.Option(min=1, help="Processes in all, with --distributed HOST:PORT.")]
ProcessId = Annotated[int | None, typer.Option(min=0, help="This process, counted from 0; process 0 prints.")]
JoinTimeout = Annotated[float, typer.Option(min=0, metavar="SECONDS", help="How long to wait for all processes.")]
JOIN_TIMEOUT = distributed.JOIN_TIMEOUT_SECONDS


@contextlib.contextmanager
def rendezvous(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout_seconds: float,
    mesh: str | None,
) -> Iterator[None]:
    """Makes this process one of several, if that was asked for; only process 0 prints, and errors pass through.

    coordinator: where process 0 listens, "auto", or None for a single process.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise typer.BadParameter("--num-processes and --process-id go with --distributed HOST:PORT (or auto)")
        yield
        return
    if mesh is None:
        raise typer.BadParameter("--distributed needs --mesh: how the devices of all processes split one model")
    try:
        distributed.start(
            coordinator, num_processes=num_processes, process_id=process_id, timeout_seconds=timeout_seconds
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with _only_the_first_prints():
        yield


@contextlib.contextmanager
def _only_the_first_prints() -> Iterator[None]:
    """Only what process 0 prints is the command's output: Gloo, for one, prints lines of its own."""
    if jax.process_count() == 1:
        yield
        return
    encoding = sys.stdout.encoding
    sys.stdout.flush()
    output = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.ExitStack() as stack:
            target = os.dup(output) if distributed.is_first() else os.devnull
            stream = stack.enter_context(open(target, "w", encoding=encoding, errors="backslashreplace"))
            stack.enter_context(contextlib.redirect_stdout(stream))
            if not distributed.is_first():
                stack.enter_context(contextlib.redirect_stderr(stream))
            yield
    finally:
        os.dup2(output, 1)
        os.close(output)


def error_prefix() -> str:
    """The process that an error comes from, empty for a single process."""
    if not jax.distributed.is_initialized():
        return ""
    return f"process {jax.process_index()} of {jax.process_count()}: "


def leave_if_distributed(code: int) -> None:
    """Ends a process that has failed at once if others may be waiting for it."""
    if jax.distributed.is_initialized():
        distributed.leave_at_once(code)
