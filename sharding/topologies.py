"""Describes TPU slices through libtpu, which compiles for any slice on a machine without TPUs."""

import importlib.util
import os
from functools import cache
from typing import Any

from jax.experimental import topologies

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # processes side by side
}


def require_libtpu() -> None:
    """Raises ModuleNotFoundError, with what to install, if this process cannot compile for TPU."""
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("compiling for TPU needs libtpu (Linux on x86-64): pip install 'decodax[tpu]'")


@cache
def tpu_devices(name: str) -> tuple[Any, ...]:
    """The chips of a TPU slice, such as "v5e:4x4", which need not exist.

    Raises ModuleNotFoundError without libtpu.
    Raises ValueError for a name that libtpu does not know.
    """
    require_libtpu()
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:
        reason = str(error).removeprefix("INVALID_ARGUMENT: ")
        raise ValueError(f"libtpu knows no topology {name!r}: {reason}") from error
