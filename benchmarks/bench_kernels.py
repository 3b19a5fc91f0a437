"""Measures how fast the kernels are, beside the device's limits, XLA, and peers.

    python -m benchmarks.bench_kernels                          # on a Hopper GPU or a TPU
    python -m benchmarks.bench_kernels --kernel flash_decode    # one of them, beside what the file holds of others
    python -m benchmarks.bench_kernels --quick                  # tiny sizes, anywhere, to see that it works

For every kernel and shape, first the gate: the same random operands through the kernel and through its reference in
plain JAX. A kernel that does not pass is not timed. Then kernel, XLA and peers alternate, and medians of the rounds
count; every timed run is many calls inside one compiled program, so that only the device is timed. The roofline is
measured on this device in the same run: the bytes per second of a large copy and the operations per second of a large
bfloat16 matrix product, again before each kernel.

Without a GPU or TPU, only `--quick` runs: kernels in their interpreters, and XLA at sizes whose times mean nothing. It
writes no file without `--output`.
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from benchmarks import _bench_common as common
from benchmarks import _bench_device_time as device_time
from benchmarks import _bench_kernel_cases as kernel_cases
from benchmarks._bench_kernel_cases import Case, call
from benchmarks._bench_kernel_gate import gate, is_open, words
from benchmarks._bench_kernel_peers import peers
from benchmarks._bench_kernel_pictures import draw_roofline
from decodax.kernels_pallas import KERNELS
from decodax.kernels_pallas.selection import backend_of_this_device

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SEED = 0
MEMORY_SHARE = 0.4  # of the device's memory for a case's operands: XLA and peers need the rest


@dataclasses.dataclass(frozen=True)
class Size:
    """The sizes of the measurement."""

    rounds: int
    run_seconds: float
    copy_bytes: int
    matmul_size: int


FULL = Size(5, device_time.RUN_SECONDS, device_time.COPY_BYTES, device_time.MATMUL_SIZE)
QUICK = Size(1, 0.0, 1 << 20, 128)


@dataclasses.dataclass(frozen=True)
class Limits:
    """The measured limits of the device."""

    copy_bytes_per_second: float
    matmul_flops_per_second: float

    def seconds(self, num_bytes: int, flops: int) -> float:
        """The least that moving these bytes and doing these operations takes."""
        return max(num_bytes / self.copy_bytes_per_second, flops / self.matmul_flops_per_second)


def measure_limits(size: Size) -> Limits:
    options = {"rounds": size.rounds, "run_seconds": size.run_seconds}
    copied = device_time.copy_bytes_per_second(size.copy_bytes, **options)
    return Limits(copied, device_time.matmul_flops_per_second(size.matmul_size, **options))


def kernel_implementations() -> list[str]:
    """The kernels that run here: this device's, or those that an interpreter runs on CPU."""
    backend, _ = backend_of_this_device()
    if backend != "xla":
        return [backend]
    return ["tpu_interpreted", "gpu_interpreted"] if jax.default_backend() == "cpu" else []


def measure(case: Case, limits: Limits, size: Size) -> list[dict[str, Any]]:
    """Records of one case: a kernel with its gate, then XLA and the peers; those that did not run say why."""
    described = describe(case)
    device_bytes = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if device_bytes is not None and case.num_bytes() > MEMORY_SHARE * device_bytes:
        too_large = f"its operands take {case.num_bytes() / 1e9:.1f} GB of the device's {device_bytes / 1e9:.1f}"
        return [described | {"implementation": kernel_implementations()[0], "left_out": too_large}]
    operands, options = case.operands(SEED), case.shape.options()
    runs = {name: (call(case.kernel, options, name), operands) for name in kernel_implementations()}
    runs |= {"xla": (call(case.kernel, options, "xla"), operands)} | peers(case, operands)
    found: dict[str, dict[str, Any]] = {name: {} for name in runs}
    try:
        expected = jax.block_until_ready(jax.jit(runs["xla"][0])(operands))
    except jax.errors.JaxRuntimeError as error:
        return [described | {"implementation": "xla"} | failed(error)]
    for name, (function, its_operands) in runs.items():
        if name != "xla":
            reference = expected if its_operands is operands else jax.tree.leaves(expected)[0]
            found[name] = checked(case, function, its_operands, reference)
    del expected
    turns = {}
    for name, run in runs.items():
        if "left_out" not in found[name] and not name.endswith("_interpreted"):
            try:
                timer = device_time.timed(*run, run_seconds=size.run_seconds)
            except jax.errors.JaxRuntimeError as error:
                found[name] |= failed(error)
            else:
                turns[name] = lambda timer=timer: {"seconds": timer()}
    summaries = common.summarise(common.alternate(turns, size.rounds, pause_s=0.0))
    return [
        described | {"implementation": name} | record | speed(case, summaries.get(name), limits)
        for name, record in found.items()
    ]


def checked(case: Case, function: Callable[[Any], Any], operands: Any, expected: Any) -> dict[str, Any]:
    """The gate's outcome, and why the function cannot be timed, if it cannot."""
    try:
        outcome = gate(case.kernel, case.dtype, case.shape.options(), jax.jit(function)(operands), expected)
    except NotImplementedError as unsupported_reason:
        return {"left_out": str(unsupported_reason)}
    except jax.errors.JaxRuntimeError as error:
        return failed(error)
    if is_open(outcome):
        return {"gate": outcome}
    return {"gate": outcome, "left_out": f"gate {words(outcome)}", "failed": True}


def failed(error: Exception) -> dict[str, Any]:
    """The record of a failure on the device, such as XLA's temporaries that do not fit into its memory."""
    return {"left_out": f"it failed: {error}"[:500], "failed": True}


def describe(case: Case) -> dict[str, Any]:
    """The case, the device and the versions."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(case.shape.operands())
    operands = {jax.tree_util.keystr(path): f"{leaf.dtype.name}{list(leaf.shape)}" for path, leaf in leaves}
    machine = common.machine()
    return {
        "kernel": case.kernel,
        "shape": case.name,
        "dtype": case.dtype,
        "operands": operands,
        "options": case.shape.options(),
        "bytes": case.shape.bytes_moved(),
        "flops": case.shape.flops(),
        "target": dataclasses.asdict(case.target) if case.target else None,
        "device": machine["device"],
        "jax": machine["versions"]["jax"],
        "date": machine["date"],
    }


def speed(case: Case, seconds: dict[str, dict[str, float]] | None, limits: Limits) -> dict[str, Any]:
    """The figures of a contestant that was timed."""
    if seconds is None:
        return {}
    summary = seconds["seconds"]
    median, num_bytes, flops = summary["median"], case.shape.bytes_moved(), case.shape.flops()
    return {
        "seconds": median,
        "seconds_min": summary["min"],
        "seconds_max": summary["max"],
        "terabytes_per_second": num_bytes / median / 1e12,
        "teraflops_per_second": flops / median / 1e12,
        "of_copy_bandwidth": num_bytes / median / limits.copy_bytes_per_second,
        "of_matmul_rate": flops / median / limits.matmul_flops_per_second,
        "fraction_of_roofline": limits.seconds(num_bytes, flops) / median,
        **dataclasses.asdict(limits),
    }


def print_records(kernel: str, records: list[dict[str, Any]]) -> None:
    rows = []
    for record in records:
        name, target = record["implementation"], record["target"]
        if "seconds" in record:
            figures = [1e6 * record["seconds"], record["terabytes_per_second"], record["teraflops_per_second"]]
            figures += [record["of_copy_bandwidth"], record["of_matmul_rate"], record["fraction_of_roofline"]]
            goal = f"{target['at_least']:.2f} of {target['of']}" if target and name in ("tpu", "gpu") else ""
            rows.append([record["shape"], name, *figures, goal])
        note = record.get("left_out") or (f"gate {words(record['gate'])}" if "gate" in record else "")
        if note:
            Console().print(f"{kernel}, {record['shape']}, {name}: {note}", soft_wrap=True)
    headings = ["shape", "runs", "us", "TB/s", "TFLOP/s", "of copy", "of matmul", "of roofline", "target"]
    common.print_table(kernel, headings, rows)


def compare(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratios of times that have targets, of those cases that this device's kernels ran."""
    times = {
        (r["kernel"], r["shape"]): r["seconds"]
        for r in records
        if r["implementation"] in ("tpu", "gpu") and "seconds" in r
    }
    found = []
    for comparison in kernel_cases.COMPARISONS:
        if comparison.of in times and comparison.over in times:
            ratio = times[comparison.of] / times[comparison.over]
            found.append({"name": comparison.name, "ratio": ratio, "target": comparison.target})
            Console().print(f"{comparison.name}: {ratio:.2f} (target {comparison.target})", soft_wrap=True)
    return found


def read_records(path: Path, make_cases: Callable[[str], list[Case]]) -> list[dict[str, Any]]:
    """The records of a result file whose cases still exist."""
    if not path.exists():
        return []
    existing = {(case.kernel, case.name) for kernel in KERNELS for case in make_cases(kernel)}
    return [r for r in json.loads(path.read_text())["records"] if (r["kernel"], r["shape"]) in existing]


def default_output() -> Path:
    device = re.sub(r"\W+", "_", common.machine()["device"]).strip("_").lower()
    return common.RESULTS / f"bench_kernels_{device}.json"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=list(KERNELS), action="append", help="only this one (default: all)")
    parser.add_argument("--shape", default="", help="only shapes whose name holds this text")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--output", type=Path, help="default: results/bench_kernels_<device>.json; with --quick, none")
    parser.add_argument("--picture", type=Path, help="default: docs/images/bench_kernels.png; with --quick, none")
    options = parser.parse_args(arguments)
    here, reason = backend_of_this_device()
    if here == "xla" and not options.quick:
        parser.error(f"{reason}: only --quick runs here, and it measures nothing")
    if options.quick:
        Console().print(f"tiny sizes: no time of this run says anything about a kernel's speed ({reason})")
    size = QUICK if options.quick else FULL
    output = options.output or (None if options.quick else default_output())
    picture = options.picture or (None if options.quick else IMAGES / "bench_kernels.png")
    jax.config.update("jax_enable_compilation_cache", False)
    make_cases = kernel_cases.quick_cases if options.quick else kernel_cases.cases
    result = common.machine() | {"records": read_records(output, make_cases) if output else []}
    for kernel in options.kernel or KERNELS:
        cases = [case for case in make_cases(kernel) if options.shape in case.name]
        limits = measure_limits(size)
        measured = []
        for case in cases:
            records = measure(case, limits, size)
            measured += records
            others = [r for r in result["records"] if (r["kernel"], r["shape"]) != (kernel, case.name)]
            result["records"] = others + records
            if output:
                common.write_json(output, result)
            jax.clear_caches()
        print_records(kernel, measured)
    result["comparisons"] = compare(result["records"])
    if output:
        common.write_json(output, result)
    if picture:
        draw_roofline(result, picture)
        Console().print(f"wrote {picture}", soft_wrap=True)
    failures = [f"{r['kernel']}, {r['shape']}, {r['implementation']}" for r in result["records"] if r.get("failed")]
    if failures:
        raise SystemExit(f"not timed, as they failed: {'; '.join(failures)}")


if __name__ == "__main__":
    main()
