"""Keeps JAX from starting libtpu on a machine without a TPU, where it takes seconds and prints pages of warnings.

libtpu may be installed to compile for TPUs that are not there (`decodax plan`), which needs no TPU started.
"""

import os
from importlib.util import find_spec
from pathlib import Path

_CHIP_FILES = ("accel*", "vfio/[0-9]*")  # of TPU v4 and before, and after
_GOOGLE = "0x1ae0"  # the vendor of TPUs on the PCI bus
_GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm60_plugin", "jax_rocm7_plugin")


def leave_out_absent_tpus(dev: Path = Path("/dev"), bus: Path = Path("/sys/bus/pci/devices")) -> None:
    """Sets JAX_PLATFORMS to cpu where libtpu is installed and there is neither a TPU nor what drives a GPU.

    To be called before JAX is imported. JAX_PLATFORMS, where it is set, stays.

    dev, bus: folders of the system.
    """
    if "JAX_PLATFORMS" in os.environ or find_spec("libtpu") is None or any(map(find_spec, _GPU_PLUGINS)):
        return
    if not _has_tpu(dev, bus):
        os.environ["JAX_PLATFORMS"] = "cpu"


def _has_tpu(dev: Path, bus: Path) -> bool:
    """Whether the system shows a TPU, or its environment names one."""
    if any(name.startswith("TPU_") for name in os.environ) or any(next(dev.glob(file), None) for file in _CHIP_FILES):
        return True
    try:
        return any(vendor.read_text().strip() == _GOOGLE for vendor in bus.glob("*/vendor"))
    except OSError:  # not Linux, or not readable
        return False
