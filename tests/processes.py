"""Starts several processes of this package on one machine, each with CPU devices of its own."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEVICES_EACH = 4


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it wrote."""

    code: int
    out: str
    err: str


def free_port() -> int:
    """A port that nobody listens on, on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(devices: int = DEVICES_EACH) -> dict[str, str]:
    """This process's, with so many CPU devices and no traces of a cluster around the tests."""
    strange = ("SLURM_", "TPU_", "MEGASCALE_", "LWS_", "JOB", "DECODAX_", "XLA_FLAGS", "OMPI_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return kept | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}


def start(arguments: Sequence[str], *, devices: int = DEVICES_EACH, **variables: str) -> subprocess.Popen[bytes]:
    """`python ARGUMENTS` with its output in pipes."""
    command = [sys.executable, "-W", "error", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(devices) | variables, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe
    )


def finish(processes: Sequence[subprocess.Popen[bytes]], seconds: float = 240) -> list[Ended]:
    """Waits for all; kills those that have not ended in time, whose code is then negative."""
    ended = []
    try:
        for process in processes:
            try:
                out, err = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
            ended.append(Ended(process.returncode, out.decode(), err.decode()))
    finally:
        for process in processes:
            process.kill()
    return ended
