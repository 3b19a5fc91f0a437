"""Finds the coordinator, the number of processes and this process's id, from arguments or from the environment.

It reads the variables that four systems set in every process they start:

- SLURM: SLURM_NTASKS, SLURM_PROCID, SLURM_STEP_NODELIST (srun(1), "output environment variables").
- TPU slices on Google Kubernetes Engine: TPU_WORKER_HOSTNAMES, TPU_WORKER_ID, and MEGASCALE_* for several slices.
- LeaderWorkerSet from 0.6 on: LWS_LEADER_ADDRESS, LWS_GROUP_SIZE, LWS_WORKER_INDEX.
- Kubernetes JobSet: JOB_COMPLETION_INDEX, which Kubernetes sets in indexed jobs; the names JOBSET_NAME and
  REPLICATED_JOB_NAME must be passed in from the pod's labels (`scripts/pods/jobset_tpu.yaml`).

DECODAX_COORDINATOR, DECODAX_NUM_PROCESSES and DECODAX_PROCESS_ID each override those, and suffice alone. JAX reads
SLURM and TPU slices itself, and JobSet only with rights on the cluster's API; it gives a process of SLURM one GPU
whatever its node has, and does not know LeaderWorkerSet.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_PORT = 8482  # JAX's own for the coordinator of a TPU slice
_PREFIX = "DECODAX_"


@dataclass(frozen=True)
class Membership:
    """One of `num_processes` processes that run the same program, numbered from 0.

    coordinator: HOST:PORT on the machine of process 0, which the others connect to.
    num_processes: of the whole run.
    process_id: of this process.
    local_device_ids: which GPUs of its machine the process uses, None for all that it sees.
    source: where the values come from, for messages.
    Raises ValueError for an address without a port, or a number out of range.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None
    source: str = "arguments"

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise ValueError(f"num_processes must be at least 1, got {self.num_processes} ({self.source})")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"process_id must be in 0..{self.num_processes - 1} ({self.num_processes} processes), got "
                f"{self.process_id} ({self.source})"
            )
        split_address(self.coordinator)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        return split_address(self.coordinator)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[IPv6]:port"; raises ValueError for anything else.

    >>> split_address("node-1:8482"), split_address("[::1]:99")
    (('node-1', 8482), ('::1', 99))
    """
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16 or (":" in host and not bracketed):
        raise ValueError(f"a coordinator's address must be HOST:PORT with a port in 1..65535, got {address!r}")
    return host.strip("[]"), int(port)


def read_membership(
    environ: Mapping[str, str],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: tuple[int, ...] | None = None,
) -> Membership | None:
    """The membership from the environment, overridden by the arguments; None where neither says anything.

    environ: the environment.
    coordinator, num_processes, process_id, local_device_ids: as in `Membership`; None where not given.
    Raises ValueError, naming what is missing or cannot be read, where only some of the values are given.
    """
    found = _from_scheduler(environ)
    own = {
        "coordinator": environ.get(f"{_PREFIX}COORDINATOR"),
        "num_processes": _number(environ, f"{_PREFIX}NUM_PROCESSES"),
        "process_id": _number(environ, f"{_PREFIX}PROCESS_ID"),
    }
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "local_device_ids": local_device_ids,
    }
    for source, values in ((f"{_PREFIX}* variables", own), ("arguments", given)):
        known = {name: value for name, value in values.items() if value is not None}
        if known:
            found = found | known | {"source": " and ".join(filter(None, (found.get("source"), source)))}
    if not found:
        return None
    missing = [name for name in ("coordinator", "num_processes", "process_id") if found.get(name) is None]
    if missing:
        raise ValueError(
            f"{found['source']} leave open {', '.join(missing)}: set "
            f"{', '.join(_PREFIX + name.upper() for name in missing)} or pass them"
        )
    if ":" not in found["coordinator"]:
        found["coordinator"] += f":{DEFAULT_PORT}"
    return Membership(**found)


def _from_scheduler(environ: Mapping[str, str]) -> dict[str, Any]:
    """The values of the first of the four systems that started this process, None where unset; {} without any."""
    if "SLURM_PROCID" in environ:
        return _from_slurm(environ)
    if "TPU_WORKER_HOSTNAMES" in environ and "TPU_WORKER_ID" in environ:
        return _from_tpu_slices(environ)
    if "LWS_LEADER_ADDRESS" in environ:
        return {
            "coordinator": environ["LWS_LEADER_ADDRESS"],
            "num_processes": _number(environ, "LWS_GROUP_SIZE"),
            "process_id": _number(environ, "LWS_WORKER_INDEX"),
            "source": "LeaderWorkerSet",
        }
    if "JOB_COMPLETION_INDEX" in environ:
        return _from_jobset(environ)
    return {}


def _from_slurm(environ: Mapping[str, str]) -> dict[str, Any]:
    num_processes = _number(environ, "SLURM_NTASKS")
    nodes = environ.get("SLURM_STEP_NODELIST")
    if nodes is None:
        if num_processes in (None, 1):
            return {}
        # The batch script itself has all other variables: it would wait for processes that are never started.
        raise ValueError(
            f"this process is the batch script of a SLURM job of {num_processes} tasks and not one of them "
            "(SLURM_STEP_NODELIST is not set): start the program with srun"
        )
    # As in JAX, so that two jobs on one node seldom use the same port.
    port = 2**16 - 2**12 + (_number(environ, "SLURM_JOB_ID") or 0) % 2**12
    return {
        "coordinator": f"{first_host(nodes)}:{port}",
        "num_processes": num_processes,
        "process_id": _number(environ, "SLURM_PROCID"),
        "local_device_ids": _slurm_gpus(environ),
        "source": "SLURM",
    }


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list, which is where task 0 runs.

    >>> first_host("gpu[003,007-015].cluster,login1"), first_host("rack[1-2]node[01-10]"), first_host("a,b[1-3]")
    ('gpu003.cluster', 'rack1node01', 'a')
    """
    first = re.match(r"(?:\[\w[^\]]*\]|[^,\[\]])+(?=,|$)", nodes)
    if first is None:
        raise ValueError(f"a SLURM node list must look like node[001-004],gpu7, got {nodes!r}")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _slurm_gpus(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """This task's share of its node's GPUs; None (all it sees) for a node's only task, or where SLURM binds GPUs."""
    tasks = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    here = tasks[min(_number(environ, "SLURM_NODEID") or 0, len(tasks) - 1)]
    visible = [item for item in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if item]
    each = len(visible) // here
    if here == 1 or not each:
        return None
    local = _number(environ, "SLURM_LOCALID") or 0
    return tuple(range(local * each, (local + 1) * each))


def _tasks_per_node(text: str) -> list[int]:
    """The number of tasks on each node.

    >>> _tasks_per_node("4(x2),1")
    [4, 4, 1]
    """
    counts = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE must look like 4(x2),1, got {text!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _from_tpu_slices(environ: Mapping[str, str]) -> dict[str, Any]:
    """The hosts of a slice are listed in the order of their ids; slice 0 comes first."""
    hosts = environ["TPU_WORKER_HOSTNAMES"].split(",")
    slices, index = _number(environ, "MEGASCALE_NUM_SLICES") or 1, _number(environ, "MEGASCALE_SLICE_ID") or 0
    worker = _number(environ, "TPU_WORKER_ID") or 0
    return {
        "coordinator": environ.get("MEGASCALE_COORDINATOR_ADDRESS", hosts[0]).partition(":")[0],
        "num_processes": slices * len(hosts),
        "process_id": index * len(hosts) + worker,
        "source": "the TPU slice's variables",
    }


def _from_jobset(environ: Mapping[str, str]) -> dict[str, Any]:
    """Kubernetes tells a pod neither the number of pods nor the first one's name; the name follows from two labels.

    With several jobs (JOB_INDEX of REPLICATED_JOB_REPLICAS), those of job 0 come first.
    """
    index = _number(environ, "JOB_COMPLETION_INDEX")
    jobset, job = environ.get("JOBSET_NAME"), environ.get("REPLICATED_JOB_NAME")
    total, jobs = _number(environ, f"{_PREFIX}NUM_PROCESSES"), _number(environ, "REPLICATED_JOB_REPLICAS")
    if total is not None and jobs is not None and index is not None:
        if total % jobs:
            raise ValueError(f"{total} processes do not divide over the {jobs} jobs of REPLICATED_JOB_REPLICAS")
        index += (_number(environ, "JOB_INDEX") or 0) * (total // jobs)
    return {
        "coordinator": f"{jobset}-{job}-0-0.{jobset}" if jobset and job else None,
        "process_id": index,
        "source": "Kubernetes' indexed job",
    }


def _number(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name)
    if value is None:
        return None
    if not value.strip().isdecimal():
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(value)
