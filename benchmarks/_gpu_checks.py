"""Does what the checks of a GPU's first minutes do, each in a process of its own, and gives its outcome.

An outcome is a dictionary for JSON: "passed", "line" (to print), and what was found.
"""

import contextlib
import dataclasses
import json
import subprocess
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _ahead_of_time as ahead_of_time
from benchmarks import _bench_common as common
from benchmarks import _bench_kernel_cases as kernel_cases
from benchmarks import bench_kernels, compile_kernels
from benchmarks._bench_device_time import COLD_BYTES
from benchmarks._bench_kernel_cases import call
from benchmarks._bench_kernel_gate import lse_tolerance
from benchmarks._gpu_cases import CASES, REPEATED, ValueCase, poisoned
from decodax.kernels_pallas import hopper
from decodax.kernels_pallas.flash_decode import NewTokens, flash_decode
from decodax.kernels_pallas.selection import backend_of_this_device

TIMES = bench_kernels.Size(rounds=5, run_seconds=0.05, copy_bytes=1 << 30, matmul_size=8192)
POISON_BITS = 0x7FC07FC0  # a NaN in float32, and two of them in bfloat16 and in float16
POISON_BYTES = 1 << 31
WRONG_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Settings:
    """How checks run.

    small: interpreted on CPU, and few runs.
    limits: what the device was measured to do, if it was.
    """

    small: bool = False
    limits: bench_kernels.Limits | None = None

    @property
    def implementation(self) -> str:
        return "gpu_interpreted" if self.small else "gpu"

    @property
    def runs(self) -> int:
        return 3 if self.small else 50


def read_limits(output: Path) -> bench_kernels.Limits | None:
    """The device's limits of a result file, None if they were not measured."""
    with contextlib.suppress(OSError, ValueError):
        for record in json.loads(output.read_text())["records"]:
            if "limits" in record:
                return bench_kernels.Limits(**record["limits"])
    return None


def first_case(kernel: str) -> ValueCase:
    """The smallest operands."""
    return next(iter(CASES[kernel].values()))


def versions(settings: Settings) -> dict[str, Any]:
    """The device, and what compiles for it.

    Raises RuntimeError where kernels do not run at all: nothing else is tried there.
    """
    backend, reason = backend_of_this_device()
    device = jax.devices()[0]
    found = {
        **common.machine(),
        "compilers": compile_kernels.compilers(),
        "compute_capability": getattr(device, "compute_capability", None),
        "num_cores": hopper.num_cores(),
        "cuda_runtime": hopper.cuda_version(),
        "miscompiled_reason": hopper.miscompiled_reason(),
        "ptxas": _output("ptxas", "--version"),
        "nvidia-smi": _output(
            "nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,clocks.sm,memory.total", "--format=csv"
        ),
        "backend": reason,
    }
    words = f"{found['device']}, JAX {jax.__version__}, CUDA {found['cuda_runtime']}; {reason}"
    if not settings.small and backend != "gpu":
        raise RuntimeError(f"{words}: only --small runs here")
    return {**found, "passed": True, "line": words}


def _output(*command: str) -> str | None:
    """What a program prints, None where it is not there or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None


def speeds(settings: Settings) -> dict[str, Any]:
    """The two figures that all shares refer to: bytes of a large copy, operations of a large product, per second."""
    limits = bench_kernels.measure_limits(bench_kernels.QUICK if settings.small else bench_kernels.FULL)
    line = f"copy {limits.copy_bytes_per_second / 1e12:.3f} TB/s, product {limits.matmul_flops_per_second / 1e12:.1f}"
    return {"passed": True, "line": f"{line} TFLOP/s", "limits": dataclasses.asdict(limits)}


def compiled(kernel: str, settings: Settings) -> dict[str, Any]:
    """Compiles the kernel for a Hopper GPU ahead of time: no device is touched. Fails if registers are spilled.

    Raises only where the kernel cannot even be lowered: without ptxas's figures it can still be run.
    """
    shape = first_case(kernel).shape
    run = call(kernel, shape.options(), "gpu")
    lowered = jax.jit(run).trace(shape.operands()).lower(lowering_platforms=("cuda",))
    try:
        ahead_of_time.prepare("gpu")
        found = compile_kernels.compile_gpu(kernel, shape, "sm_90a")
    except ModuleNotFoundError as missing:
        shared = [launch.shared_memory_bytes for launch in ahead_of_time.launches(lowered)]
        line = f"lowered only, {shared} bytes of shared memory: {missing}"
        return {"passed": bool(shared), "line": line, "shared_memory_bytes": shared}
    except Exception as error:  # of any compiler
        traceback.print_exc()
        return {"passed": False, "line": f"lowered, but not compiled: {type(error).__name__}: {error}"[:500]}
    spilled = sum(map(compile_kernels.spills, found["kernels"]))
    figures = "; ".join(map(compile_kernels.line, found["kernels"]))
    return {**found, "passed": not spilled, "line": f"{compile_kernels.HEADINGS['gpu']}: {figures}"}


def values(kernel: str, name: str, settings: Settings) -> dict[str, Any]:
    """Compares the kernel, in poisoned memory, with XLA in float32 at the highest precision."""
    case = CASES[kernel][name]
    operands, options = case.operands(kernel), case.options()
    got = run_poisoned(
        call(kernel, options, settings.implementation),
        poisoned(kernel, operands, options),
        0 if settings.small else POISON_BYTES,
    )
    exact = in_float32(operands)
    with jax.default_matmul_precision("highest"):
        expected = jax.tree.leaves(jax.jit(call(kernel, options, "xla"))(exact))
        bounds = error_bounds(kernel, case, exact, expected)
    outputs = [compare(*triple) for triple in zip(jax.tree.leaves(got), expected, bounds, strict=True)]
    line = "; ".join(output["line"] for output in outputs)
    return {"passed": all(output["passed"] for output in outputs), "line": line, "outputs": outputs}


def run_poisoned(run: Callable[[Any], Any], operands: Any, num_bytes: int) -> Any:
    """Runs a function where unwritten results are NaN, and most likely other unwritten memory, too.

    Results take the memory of donated buffers of NaN; what else the program allocates comes from `num_bytes` that were
    NaN just before.
    """
    results = jax.eval_shape(run, operands)
    donated = jax.tree.map(lambda like: jnp.full(like.shape, jnp.nan, like.dtype), results)
    program = jax.jit(lambda operands, _: run(operands), donate_argnums=1, keep_unused=True)
    program = program.lower(operands, donated).compile()
    if num_bytes:
        jax.block_until_ready(jnp.full(num_bytes // 4, POISON_BITS, jnp.uint32)).delete()
    return jax.block_until_ready(program(operands, donated))


def in_float32(operands: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, operands)


def error_bounds(kernel: str, case: ValueCase, operands: Any, expected: list[jax.Array]) -> list[np.ndarray]:
    """How far each number may be from the exact one.

    An output is rounded once, and so are the weights of a sum before, each by at most half a unit in the last place
    (eps / 2): that much of the output, and of the same sum over absolute values. In linear attention that sum has four
    rounded factors (query, key and their score, the state). float32 sums in another order: 1e-5 of the largest output.
    """
    half_unit = float(jnp.finfo(case.shape.dtype).eps) / 2
    softcap = case.options().get("softcap") or 0.0
    largest = [float(jnp.max(jnp.abs(x), where=jnp.isfinite(x), initial=0.0)) for x in expected]
    if kernel.startswith("grouped"):
        return [half_unit * np.abs(np.asarray(x)) + 1e-5 * most for x, most in zip(expected, largest, strict=True)]
    sums = _sums_of_absolute_values(kernel, case.options(), operands)
    if kernel == "linear_attention":
        return [
            half_unit * np.asarray(4 * total + jnp.abs(x)) + 1e-5 * most
            for total, x, most in zip(sums, expected, largest, strict=True)
        ]
    # A score may be off by 2^-11 of the soft-cap (see `lse_tolerance`), and so its weight by that share, twice.
    rounded = half_unit * np.abs(np.asarray(expected[0])) + (half_unit + 2**-10 * softcap) * np.asarray(sums[0])
    lse = lse_tolerance(case.options()) * (1 + largest[1])
    return [rounded + 1e-5 * largest[0], np.full(expected[1].shape, lse)]


def _sums_of_absolute_values(kernel: str, options: Mapping[str, Any], operands: dict[str, Any]) -> list[jax.Array]:
    """The kernel's sums with absolute values instead of values (of all that is summed, in linear attention)."""
    if kernel == "mla_decode":  # as attention with one key-value head, whose values are not its keys
        new = operands["new"]
        join = lambda *pair: jnp.concatenate(pair, axis=-1)
        key, new_key = join(operands["latent"], operands["rope_key"]), join(new.latent, new.rope_key)
        query = join(operands["query_latent"], operands["query_rope"])
        new = NewTokens(new_key[:, None], jnp.abs(new.latent)[:, None], new.allowed)
        arrays = (query, key[:, None], jnp.abs(operands["latent"])[:, None], operands["length"], new)
        run = jax.jit(lambda arrays: flash_decode(*arrays, **options, implementation="xla"))
        return list(run(arrays))
    changed = dict(operands)
    names = ("query", "key", "value", "state") if kernel == "linear_attention" else ("value", "value_pages")
    changed |= {name: jnp.abs(operands[name]) for name in names if name in operands}
    if isinstance(new := operands.get("new"), NewTokens):
        changed["new"] = new._replace(value=jnp.abs(new.value))
    return jax.tree.leaves(jax.jit(call(kernel, options, "xla"))(changed))


def compare(got: jax.Array, expected: jax.Array, bound: np.ndarray) -> dict[str, Any]:
    """The largest error over its bound, how many numbers are wrong and how many NaN, and where the first ones are.

    Infinities must be equal; NaN is always wrong.
    """
    ours, exact = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    with np.errstate(invalid="ignore"):
        share = np.where(np.isfinite(exact), np.abs(ours - exact) / bound, np.where(ours == exact, 0.0, np.inf))
    share = np.where(ours == exact, 0.0, np.where(np.isnan(share), np.inf, share))
    wrong = np.argwhere(share > 1)
    found = {
        "passed": not len(wrong),
        "error_over_tolerance": float(share.max(initial=0.0)),
        "num_wrong": len(wrong),
        "num_nan": int(np.isnan(ours).sum()),
        "shape": list(ours.shape),
        "first_wrong": [[int(i) for i in index] for index in wrong[:WRONG_SHOWN]],
        "got": [float(ours[tuple(index)]) for index in wrong[:WRONG_SHOWN]],
        "expected": [float(exact[tuple(index)]) for index in wrong[:WRONG_SHOWN]],
        "wrong_along_axis": [np.unique(wrong[:, axis])[:64].tolist() for axis in range(ours.ndim)],
    }
    words = f"error / tolerance {found['error_over_tolerance']:.2f}"
    if len(wrong):
        words += f", {len(wrong)} of {ours.size} wrong, {found['num_nan']} NaN, first {found['first_wrong'][0]}"
        words += f" of {found['shape']}"
    return {**found, "line": words}


def repeats(kernel: str, settings: Settings) -> dict[str, Any]:
    """Runs the kernel again and again on the same operands: every bit must be the same. Between runs, L2 is emptied."""
    case = first_case(kernel) if settings.small else REPEATED[kernel]
    options = case.options()
    operands = poisoned(kernel, case.operands(kernel), options)
    run = jax.jit(call(kernel, options, settings.implementation))
    first = run(operands)
    count = jax.jit(lambda ours, first: [jnp.sum(_bits(x) != _bits(y)) for x, y in _pairs(ours, first)])
    other = jnp.ones(1 if settings.small else COLD_BYTES // 4, jnp.float32)
    different = {}
    for number in range(1, settings.runs):
        if number % 2:
            jax.block_until_ready(jnp.sum(other))
        if changed := sum(map(int, count(run(operands), first))):
            different[number] = changed
    line = f"{settings.runs} runs, {len(different)} of them different from the first"
    return {"passed": not different, "line": line, "runs": settings.runs, "different_numbers": different}


def _bits(array: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(array, {2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize])


def _pairs(ours: Any, theirs: Any) -> Any:
    return zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)


def times(kernel: str, name: str, settings: Settings) -> dict[str, Any]:
    """Times the kernel beside XLA and the peers, medians of alternating runs, as the kernels' benchmark does."""
    case = next(case for case in kernel_cases.cases(kernel) if case.name == name)
    limits = settings.limits or bench_kernels.measure_limits(TIMES)
    records = bench_kernels.measure(case, limits, TIMES)
    said = []
    for record in records:
        if "seconds" in record:
            shares = f"{record['of_copy_bandwidth']:.2f} of copy, {record['of_matmul_rate']:.2f} of product"
            said.append(f"{record['implementation']} {1e6 * record['seconds']:.1f} us ({shares})")
        else:
            said.append(f"{record['implementation']}: {record.get('left_out', 'not timed')[:120]}")
    ours = next(record for record in records if record["implementation"] == settings.implementation)
    outcome = {"passed": "seconds" in ours, "line": "; ".join(said), "measured": records}
    if "left_out" in ours and not ours.get("failed"):
        outcome["refused"] = ours["left_out"]
    return outcome
