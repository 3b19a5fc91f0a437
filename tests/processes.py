"""Starts several processes of this package on one machine, each with its own CPU devices."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
DEVICES_EACH = 4


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it wrote."""

    code: int
    out: str
    err: str


def free_port() -> int:
    """A free port on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(devices: int = DEVICES_EACH) -> dict[str, str]:
    """This process's environment, with `devices` CPU devices and without variables of a surrounding cluster."""
    strange = ("SLURM_", "TPU_", "MEGASCALE_", "LWS_", "JOB", "DECODAX_", "XLA_FLAGS", "OMPI_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return kept | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}


@dataclass(frozen=True)
class Started:
    """A process, and the files that it writes to: a full pipe could block the others, too."""

    process: subprocess.Popen[bytes]
    out: IO[bytes]
    err: IO[bytes]

    def ended(self) -> Ended:
        texts = []
        for file in (self.out, self.err):
            file.seek(0)
            texts.append(file.read().decode())
            file.close()
        return Ended(self.process.returncode, *texts)


def start(arguments: Sequence[str], *, devices: int = DEVICES_EACH) -> Started:
    """Starts `python ARGUMENTS`, with `devices` CPU devices."""
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (`ended` closes them)
    command = [sys.executable, "-W", "error", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(devices), stdin=subprocess.DEVNULL, stdout=out, stderr=err
    )
    return Started(process, out, err)


def finish(started: Sequence[Started], seconds: float = 240) -> list[Ended]:
    """Waits for all; those that have not ended in time are killed, and their code is negative."""
    deadline = time.monotonic() + seconds
    for one in started:
        try:
            one.process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            break
    for one in started:
        one.process.kill()
        one.process.wait()
    return [one.ended() for one in started]
