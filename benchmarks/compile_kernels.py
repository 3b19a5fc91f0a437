"""Compiles every Pallas kernel at its real sizes for a chip that is not there, and records the compiler's figures.

    python -m benchmarks.compile_kernels --for tpu      # v5e and v6e; needs libtpu
    python -m benchmarks.compile_kernels --for gpu      # sm_90a, ptxas included; needs the extra `gpu-compile`

JAX tries to use every plug-in that is installed, so `pip install 'decodax[gpu-compile]'` needs its own environment
(1.7 GB in all): JAX's CUDA plug-in, and ptxas with what it links from NVIDIA's wheels.

GPU: registers, spills and shared memory of each kernel, from ptxas; a kernel that spills makes the exit code 1.
TPU: VMEM of each kernel, and XLA's own figures of the program around it. Nothing is run, and no time but that of
compiling is measured: that is `bench_kernels`, on the chip.
"""

import argparse
import contextlib
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.progress import track

from benchmarks import _ahead_of_time as ahead_of_time
from benchmarks import _bench_common as common
from benchmarks._bench_kernel_cases import call
from decodax.kernels_pallas import KERNELS, hopper, shapes_of


def cases(only: str | None) -> list[tuple[str, str, Any]]:
    """Kernel, name of the shape, shape."""
    kernels = [only] if only else list(KERNELS)
    return [(kernel, name, shape) for kernel in kernels for name, shape in shapes_of(kernel).items()]


def compile_tpu(kernel: str, shape: Any, chip: str) -> dict[str, Any]:
    start = time.perf_counter()
    compiled = ahead_of_time.compile_for_tpu(chip, call(kernel, shape.options(), "tpu"), shape.operands())
    seconds = time.perf_counter() - start
    vmem = ahead_of_time.vmem_bytes(compiled)
    if not vmem:
        raise RuntimeError(f"the program compiled for {kernel} calls no Pallas kernel")
    figures = compiled.cost_analysis() or {}
    cost = {key: figures[key] for key in ("flops", "bytes accessed") if key in figures}
    kernels = [{"name": name, "vmem_bytes": num_bytes} for name, num_bytes in vmem.items()]
    return {"compile_seconds": seconds, "kernels": kernels, "cost": cost, "memory": memory(compiled)}


def compile_gpu(kernel: str, shape: Any, chip: str) -> dict[str, Any]:
    start = time.perf_counter()
    hopper.cuda_version = lambda: None  # what compiles is a package's ptxas, and nothing runs
    compiled, kernels = ahead_of_time.compile_for_gpu(call(kernel, shape.options(), "gpu"), shape.operands())
    seconds = time.perf_counter() - start
    if not kernels:
        raise RuntimeError(f"ptxas compiled no kernel for {kernel}")
    return {"compile_seconds": seconds, "kernels": kernels, "memory": memory(compiled)}


def memory(compiled: Any) -> dict[str, int]:
    """The device memory of the program."""
    stats = compiled.memory_analysis()
    return {f"{kind}_bytes": getattr(stats, f"{kind}_size_in_bytes") for kind in ("argument", "output", "temp")}


def spills(kernel: dict[str, Any]) -> int:
    """Bytes per thread that a kernel spills from registers to memory."""
    return kernel.get("spill_store_bytes", 0) + kernel.get("spill_load_bytes", 0)


COMPILERS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc")
COMPILE = {"tpu": compile_tpu, "gpu": compile_gpu}
COMPILED_FOR = {"tpu": list(ahead_of_time.CHIPS), "gpu": ["sm_90a"]}
HEADINGS = {"tpu": "VMEM KiB", "gpu": "registers, spill bytes, shared KiB"}


def line(kernel: dict[str, Any]) -> str:
    """A kernel's figures for the table."""
    if "vmem_bytes" in kernel:
        return f"{kernel['vmem_bytes'] / 1024:,.0f}"
    return f"{kernel['registers']}, {spills(kernel)}, {(kernel['shared_memory_bytes'] or 0) / 1024:,.0f}"


def compile_all(backend: str, only: str | None) -> list[dict[str, Any]]:
    """A record per kernel, shape and chip; one that does not compile has an `error` instead of figures."""
    records = []
    for kernel, name, shape in track(cases(only), f"compiling for {backend}", transient=True):
        for chip in COMPILED_FOR[backend]:
            record = {"kernel": kernel, "shape": name, "for": chip}
            try:
                record |= COMPILE[backend](kernel, shape, chip)
            except NotImplementedError as unsupported_reason:
                record["unsupported_reason"] = str(unsupported_reason)
            except Exception as error:  # any error of a compiler: the other kernels are still compiled
                record["error"] = f"{type(error).__name__}: {error}"[:2000]
            records.append(record)
    return records


def report(backend: str, records: list[dict[str, Any]]) -> bool:
    """Prints the records; returns whether every kernel compiled, and without spills."""
    rows, fine = [], True
    for record in records:
        failed = "error" in record or any(spills(kernel) for kernel in record.get("kernels", []))
        fine &= not failed
        message = record.get("error", record.get("unsupported_reason"))
        figures = message.splitlines()[0] if message else "; ".join(map(line, record["kernels"]))
        seconds = record.get("compile_seconds")
        rows.append([record["kernel"], record["shape"], record["for"], figures, seconds, "FAILED" if failed else ""])
    common.print_table(f"compiled for {backend}", ["kernel", "shape", "for", HEADINGS[backend], "compile s", ""], rows)
    return fine


def compilers() -> dict[str, str]:
    """Versions of the installed packages that hold the compilers."""
    found = {}
    for package in COMPILERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--for", dest="backend", choices=list(COMPILE), required=True)
    parser.add_argument("--kernel", choices=list(KERNELS), help="only this one (written to a file only with --output)")
    parser.add_argument("--output", type=Path, help="default: results/compile_kernels_<for>.json")
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # the chip that is compiled for need not be there
    jax.config.update("jax_enable_compilation_cache", False)  # a cached program has no compiler output
    try:
        ahead_of_time.prepare(options.backend)
    except ModuleNotFoundError as missing:
        raise SystemExit(str(missing)) from missing
    records = compile_all(options.backend, options.kernel)
    fine = report(options.backend, records)
    path = options.output or (None if options.kernel else common.RESULTS / f"compile_kernels_{options.backend}.json")
    if path:
        machine = {key: common.machine()[key] for key in ("date", "python", "versions")}
        common.write_json(path, machine | {"compilers": compilers(), "records": records})
    if not fine:
        raise SystemExit("a kernel spills or does not compile")


if __name__ == "__main__":
    main()
