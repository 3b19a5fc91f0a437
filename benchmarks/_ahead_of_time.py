"""Compiles for chips that are not there: for TPUs with libtpu, for a Hopper GPU with JAX's CUDA plug-in and ptxas.

TPU: needs libtpu (Linux on x86-64). GPU: needs the extra `gpu-compile`, in an environment of its own, as JAX tries to
use every plug-in that is installed.
"""

import importlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.mosaic.gpu.core import dialect
from jax.extend.mlir import ir
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from decodax.sharding.topologies import require_libtpu, tpu_devices

CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
# What XLA asks of a device: figures of the H100 SXM (NVIDIA H100 whitepaper; CUDA's device query for the limits).
_HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: 84978434048
  cuda_compute_capability { major: 9 }  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_DYNAMIC_SHARED_MEMORY = (
    10  # its place among gpu.launch's groups of operands: after asynchronous ones and three triples
)
_COMPILED: dict[bytes, dict[str, Any]] = {}  # as JAX keeps what it compiled, and ptxas reports a kernel only once
_PTXAS_PATTERNS = {
    "registers": r"Used (\d+) registers",
    "spill_store_bytes": r"(\d+) bytes spill stores",
    "spill_load_bytes": r"(\d+) bytes spill loads",
    "stack_bytes": r"(\d+) bytes stack frame",
}


def prepare(backend: str) -> None:
    """Checks that this process can compile for "tpu" or "gpu".

    Raises ModuleNotFoundError, with what to install, if it cannot.
    """
    if backend == "gpu":
        _gpu()
    else:
        require_libtpu()


def compile_for_tpu(chip: str, function: Callable[..., Any], *arguments: Any, **jit_options: Any) -> Any:
    """The compiled program for one chip. Arguments are trees of arrays or shapes; no array's content is needed.

    Raises ModuleNotFoundError without libtpu.
    """
    prepare("tpu")
    sharding = _tpu(chip)

    def described(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.jit(function, **jit_options).lower(*jax.tree.map(described, arguments)).compile()


@cache
def _tpu(chip: str) -> NamedSharding:
    return _on_first_device(tpu_devices(CHIPS[chip]))


def tpu_mesh(chip: str, num_chips: int) -> Mesh:
    """Chips of one host that is not there, as a mesh with the axis "tensor".

    Raises ModuleNotFoundError without libtpu.
    """
    return Mesh(np.array(tpu_devices(CHIPS[chip])[:num_chips]), ("tensor",))


def _on_first_device(devices: Sequence[Any]) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices[:1]), ("device",)), PartitionSpec())


def count_kernels(compiled: Any, name: str) -> int:
    """How often a program compiled for TPU calls the Pallas kernel of this name."""
    lines = compiled.as_text().splitlines()
    return sum('custom_call_target="tpu_custom_call"' in line and f"/{name}" in line for line in lines)


def vmem_bytes(compiled: Any) -> dict[str, int]:
    """VMEM that each Pallas kernel of a program compiled for TPU uses, by its name in the program."""
    line = r'%?([\w.]+) = [^\n]*custom_call_target="tpu_custom_call"[^\n]*"used_scoped_memory_configs":\[([^\]]*)\]'
    size = r'"memory_space":"1"[^}]*"size":"(\d+)"'  # 1 is VMEM
    return {name: sum(map(int, re.findall(size, used))) for name, used in re.findall(line, compiled.as_text())}


def compile_for_gpu(function: Callable[..., Any], *arguments: Any, **jit_options: Any) -> tuple[Any, list[dict]]:
    """The program compiled for an H100, and the report of ptxas on each Pallas kernel in it.

    Of each: name, registers per thread, spill_store_bytes, spill_load_bytes, stack_bytes per thread, and
    shared_memory_bytes per block.
    Raises ModuleNotFoundError where the plug-in or ptxas is missing.
    """
    sharding = _gpu()
    lowered = jax.jit(function, in_shardings=sharding, out_shardings=sharding, **jit_options).lower(*arguments)
    with _all_output() as output:
        compiled = lowered.compile()
    reports = read_ptxas(output())
    for launch in launches(lowered):
        own = [figures for figures in reports if figures["name"] == launch.name]
        if launch.fingerprint not in _COMPILED and own:
            reports.remove(own[0])
            _COMPILED[launch.fingerprint] = own[0] | {"shared_memory_bytes": launch.shared_memory_bytes}
    missing = [launch.name for launch in launches(lowered) if launch.fingerprint not in _COMPILED]
    if reports or missing:
        raise RuntimeError(
            f"ptxas must report the kernels that the program launches, got {reports} besides and none of {missing}"
        )
    return compiled, [_COMPILED[launch.fingerprint] for launch in launches(lowered)]


@cache
def _gpu() -> NamedSharding:
    has_plugins = importlib.util.find_spec("jax_plugins") is not None
    plugins = [
        name for name in ("xla_cuda13", "xla_cuda12") if has_plugins and importlib.util.find_spec(f"jax_plugins.{name}")
    ]
    if not plugins:
        raise ModuleNotFoundError("JAX's CUDA plug-in is needed: pip install 'decodax[gpu-compile]'")
    importlib.import_module(f"jax_plugins.{plugins[0]}")  # which registers it
    os.environ["PATH"] = os.pathsep.join([str(_ptxas().parent), os.environ.get("PATH", "")])
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    options = {"topology": "1x1x1", "target_config": _HOPPER}
    topology = topologies.get_topology_desc(platform="cuda", topology_name="1x1x1", **options)
    return _on_first_device(topology.devices)


def _ptxas() -> Path:
    """ptxas of NVIDIA's wheels, or else of the PATH."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        found = sorted(Path(folder).glob("*/bin/ptxas"))
        if found:
            return found[-1]
    found = shutil.which("ptxas")
    if found is None:
        raise ModuleNotFoundError("ptxas is needed: pip install 'decodax[gpu-compile]'")
    return Path(found)


@contextmanager
def _all_output() -> Iterator[Callable[[], str]]:
    """Collects what this process writes to stdout and stderr, from C too; a function gives it afterwards."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(number) for number in (1, 2)]
        text = ""
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield lambda: text
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            text = file.read().decode(errors="replace")


class Launch(NamedTuple):
    """A Pallas kernel in a program for GPU.

    name: in ptxas.
    shared_memory_bytes: that it asks for, per block.
    fingerprint: the same for two kernels only if they are the same.
    """

    name: str
    shared_memory_bytes: int
    fingerprint: bytes


def launches(lowered: Any) -> list[Launch]:
    """The Pallas kernels of a program lowered for GPU."""
    found = []
    for call in _operations(lowered.compiler_ir("stablehlo").operation):
        if call.name == "stablehlo.custom_call" and "mosaic_gpu" in str(call.attributes["call_target_name"]):
            config = call.attributes["mhlo.backend_config"]
            with mlir.make_ir_context() as context:
                dialect.register_dialect(context)
                context.allow_unregistered_dialects = True
                module = ir.Module.parse(config["module"].value_bytes)
                found += [Launch(*launch, config["kernel_hash"].value_bytes) for launch in _launches(module.operation)]
    return found


def _launches(module: Any) -> Iterator[tuple[str, int]]:
    for function in _operations(module):
        if not function.name.endswith("func.func"):
            continue
        for launch in _operations(function):
            if launch.name.endswith("gpu.launch"):
                groups = list(launch.attributes["operandSegmentSizes"])
                size = launch.operands[sum(groups[:_DYNAMIC_SHARED_MEMORY])].owner.attributes["value"].value
                yield f"{function.attributes['sym_name'].value}_kernel", size


def _operations(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from _operations(inner.operation)


def read_ptxas(text: str) -> list[dict[str, Any]]:
    """The report of `ptxas -v` on each kernel."""
    pieces = re.split(r"Compiling entry function '(\w+)'", text)[1:]
    found = []
    for name, report in zip(pieces[::2], pieces[1::2], strict=True):
        figures = {key: re.search(pattern, report) for key, pattern in _PTXAS_PATTERNS.items()}
        missing = [key for key, match in figures.items() if match is None]
        if missing:
            raise ValueError(f"ptxas must report {', '.join(missing)} of {name}, got: {report[:400]}")
        found.append({"name": name} | {key: int(match[1]) for key, match in figures.items() if match})
    return found
