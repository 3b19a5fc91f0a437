"""Starts JAX over several processes, one or more on each host, so that a mesh can span the devices of all processes.

    from decodax.sharding import distributed
    distributed.start()                                                # from SLURM, Kubernetes or the TPU slice
    distributed.start("10.0.0.1:8482", num_processes=2, process_id=0)  # by hand
    lm = decodax.load(path, mesh="tensor=16")                          # the same program in every process

Call `start` before anything that makes JAX look for devices. Afterwards `jax.devices()` are those of all processes, and
every process must run the same programs in the same order. When one process ends by an error, it ends at once, and the
others end too: at once where a collective fails or process 0 is gone, else when heartbeats have been missed for
`heartbeat_seconds`. (Measured on CPU: 0.2 s with JAX 0.10; with 0.12 90 s by heartbeats when process 1 of 2 died.)
"""

import atexit
import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import NoReturn

import jax

from decodax.core.version import __version__
from decodax.sharding.membership import Membership, read_membership
from decodax.sharding.rendezvous import Hello, is_loopback, meet

AUTO = "auto"
JOIN_TIMEOUT_SECONDS = 300.0
HEARTBEAT_SECONDS = 100  # JAX's default


def start(
    coordinator: str = AUTO,
    *,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: tuple[int, ...] | None = None,
    timeout_seconds: float = JOIN_TIMEOUT_SECONDS,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    environ: Mapping[str, str] | None = None,
) -> None:
    """Joins this process with the others. With one process, or in a second call with the same values, it does nothing.

    coordinator: HOST:PORT where process 0 runs, or "auto", which reads the environment (`membership.py`) and, where
        that says nothing, asks JAX, which knows Cloud TPU virtual machines and Open MPI (and ends the process itself
        when others do not come). Values given here override the environment's.
    num_processes: of the whole run.
    process_id: of this process, from 0 on.
    local_device_ids: the GPUs of its machine that this process uses; by default all it sees.
    timeout_seconds: how long the rendezvous waits for all processes.
    heartbeat_seconds: how long heartbeats of a process may be missing.
    environ: what is read as the environment, by default that of this process.
    Raises TimeoutError, naming the address and the missing processes, when not all arrive within `timeout_seconds`.
    Raises ValueError for values that do not fit, here or between processes.
    Raises OSError when process 0 cannot listen on its port.
    Raises RuntimeError when JAX has looked for devices before.
    """
    membership = read_membership(
        os.environ if environ is None else environ,
        coordinator=None if coordinator == AUTO else coordinator,
        num_processes=num_processes,
        process_id=process_id,
        local_device_ids=local_device_ids,
    )
    if jax.distributed.is_initialized():
        _check_same_run(membership)
        return
    if membership is None:
        _let_jax_detect(timeout_seconds, heartbeat_seconds)
    elif membership.num_processes > 1:
        _join(membership, timeout_seconds, heartbeat_seconds)
    if jax.distributed.is_initialized():
        atexit.register(_leave_after_an_error)  # runs before JAX's own handler, which was registered earlier


def is_first() -> bool:
    """Whether this is process 0, which alone writes to the user."""
    return jax.process_index() == 0


def leave_at_once(code: int) -> NoReturn:
    """Ends the process after an error without JAX's shutdown barrier, in which all processes wait for each other."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _leave_after_an_error() -> None:
    if getattr(sys, "last_value", None) is not None:  # an uncaught exception, which Python has printed
        leave_at_once(1)


def _join(membership: Membership, timeout_seconds: float, heartbeat_seconds: int) -> None:
    _check_no_devices_yet()
    begin = time.monotonic()
    host, port = membership.address
    meet((host, port), _hello(membership), timeout_seconds)
    left = timeout_seconds - (time.monotonic() - begin)
    jax.distributed.initialize(
        membership.coordinator,
        membership.num_processes,
        membership.process_id,
        local_device_ids=membership.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=max(int(left), 60),  # all have arrived: the rest takes a second
        heartbeat_timeout_seconds=heartbeat_seconds,
        # By default JAX listens on all interfaces, even for a loopback address.
        coordinator_bind_address=membership.coordinator if is_loopback(host) else None,
    )


def _hello(membership: Membership) -> Hello:
    versions = f"decodax {__version__}, jax {jax.__version__}"
    return Hello(membership.process_id, membership.num_processes, socket.gethostname(), versions)


def _check_no_devices_yet() -> None:
    """Checked before the rendezvous: after it, the others would wait for this process."""
    from jax._src import xla_bridge  # JAX 0.10 to 0.12 have no public check that does not look for devices

    if xla_bridge.backends_are_initialized():
        raise RuntimeError(
            "several processes must be joined before JAX looks for devices, and it has done so: call "
            "distributed.start() before loading a model, jax.devices() or any computation"
        )


def _check_same_run(membership: Membership | None) -> None:
    is_now = (jax.process_count(), jax.process_index())
    if membership is not None and is_now != (membership.num_processes, membership.process_id):
        raise ValueError(
            f"JAX runs already as process {is_now[1]} of {is_now[0]}, and cannot be started again as process "
            f"{membership.process_id} of {membership.num_processes}"
        )


def _let_jax_detect(timeout_seconds: float, heartbeat_seconds: int) -> None:
    try:
        jax.distributed.initialize(
            initialization_timeout=int(timeout_seconds), heartbeat_timeout_seconds=heartbeat_seconds
        )
    except ValueError as error:
        raise ValueError(
            "nothing in the environment says with which processes this one runs: not SLURM (srun), LeaderWorkerSet, "
            "JobSet, a TPU slice, Open MPI or DECODAX_COORDINATOR, DECODAX_NUM_PROCESSES and DECODAX_PROCESS_ID. Pass "
            "the coordinator's HOST:PORT, the number of processes and this one's id"
        ) from error
