"""Finds out in ten minutes on a Hopper GPU whether kernels that were only compiled so far are right, and how fast.

    python -m benchmarks.gpu_first_minutes --output minutes.json                  # on a Hopper GPU
    python -m benchmarks.gpu_first_minutes --output minutes.json --kernel flash_decode
    python -m benchmarks.gpu_first_minutes --output minutes.json --small          # on CPU, to see that it works

0. Versions, the device, and two speeds: of a large copy and of a large matrix product.
1. Compiles each kernel: registers, spills, shared memory. One that does not compile is left out from here on.
2. Values at odd sizes beside XLA's in float32 at the highest precision. What no query attends to is NaN, and so is the
   memory that results are written to. Printed: the largest error over its tolerance (at most 1), numbers that are NaN,
   the index of the first wrong one; the file has which indices are wrong along each axis (every 8 rows: a copy from an
   unaligned row; every 64: a tile of a product).
3. Fifty runs on the same operands, more programs than the device runs at once: every bit must be the same, or there is
   a race.
4. compute-sanitizer's memcheck, where it is installed, on the smallest operands.
5. Times beside XLA and the peers: medians of alternating runs, and the shares of the two speeds of step 0. Last,
   compute-sanitizer's racecheck, which knows little of bulk copies and their barriers.

Every check is a process of its own with a time limit, prints one line as it ends, and is in the file by then. Those
that no longer fit into `--minutes` are recorded as "no time left". The exit code is 1 if any check failed, hung or was
killed. Nothing is traced or profiled here, and no kernel runs beside another stream of its own process; checks of
steps 1 to 4 run beside each other (`--jobs`), times alone.
"""

import argparse
import dataclasses
import datetime
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks._gpu_runner import FAILURES, ROOT, Check, child_outcome, end_on_sigterm, run_checks, summary

SMALL_LIMIT_S = 300.0  # of a check in an interpreter
SANITIZER_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
SANITIZED = ("flash_decode", "mla_decode", "flash_prefill", "grouped_matmul")
LIMITS_S = {"versions": 60.0, "speeds": 60.0, "compiled": 90.0, "values": 40.0, "repeats": 60.0, "times": 90.0}
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # checks that run side by side share the device's memory
NO_DEVICE = {"JAX_PLATFORMS": "cpu"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command was told.

    output: the result file.
    small: on CPU.
    any_cuda: whether kernels run on versions of CUDA that they refuse.
    """

    output: Path
    small: bool = False
    any_cuda: bool = False

    def check(self, step: str, *of: str, **more: object) -> Check:
        """The check of a step, of a kernel and a case or shape where the step has them."""
        limit = float(more.pop("limit_s", SMALL_LIMIT_S if self.small else LIMITS_S[step]))
        before = list(more.pop("before", ()))
        flags = [flag for flag, given in (("--small", self.small), ("--any-cuda", self.any_cuda)) if given]
        command = [*before, sys.executable, "-m", "benchmarks.gpu_first_minutes", "--output", str(self.output), *flags]
        command += ["--child", step, *of, "--limit", str(limit), "--outcome"]
        environment = {**more.pop("environment", {}), **(NO_DEVICE if self.small else {})}
        name = str(more.pop("name", ": ".join([step, ", ".join(of)]) if of else step))
        return Check(name, command, limit, environment=environment, **more)


def plan(options: Options, kernels: list[str]) -> list[Check]:
    """All checks, in the order in which they run."""
    from benchmarks._gpu_cases import CASES, TIMED

    first = {kernel: list(CASES[kernel])[: 1 if options.small else None] for kernel in kernels}
    longest = max(map(len, first.values()))
    checks = [options.check("versions", alone=True), options.check("speeds", alone=True, needs="versions")]
    checks += [options.check("compiled", kernel, needs="versions", environment=NO_DEVICE) for kernel in kernels]
    for number in range(longest):  # of every kernel the first case, then of every one the second
        for kernel, names in first.items():
            if number < len(names):
                needs = f"compiled: {kernel}"
                checks.append(options.check("values", kernel, names[number], needs=needs, environment=SHARED))
    checks += [options.check("repeats", kernel, needs=f"compiled: {kernel}", environment=SHARED) for kernel in kernels]
    if options.small:
        return checks
    some = [kernel for kernel in SANITIZED if kernel in kernels]
    timed = [(kernel, name) for kernel, name in TIMED if kernel in kernels]
    times = [options.check("times", kernel, name, needs=f"compiled: {kernel}", alone=True) for kernel, name in timed]
    return [*checks, *sanitized(options, "memcheck", some), *times, *sanitized(options, "racecheck", some)]


def sanitized(options: Options, tool: str, kernels: list[str]) -> list[Check]:
    """The smallest values of some kernels again, under a tool of compute-sanitizer."""
    from benchmarks._gpu_cases import CASES

    program = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *SANITIZER_FOLDERS]))
    if program is None:
        return [Check(tool, (), 0.0, skip="compute-sanitizer is not installed")]
    each = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", **SHARED}  # so that it sees every array
    return [
        options.check(
            "values",
            kernel,
            next(iter(CASES[kernel])),
            name=f"{tool}: {kernel}",
            before=[program, "--tool", tool, "--target-processes", "all", "--error-exitcode", "9"],
            environment=each,
            needs=f"compiled: {kernel}",
            limit_s=45.0,
            may_time_out=True,
        )
        for kernel in kernels
    ]


def run_child(options: argparse.Namespace) -> None:
    """The process of one check."""

    def run() -> dict:
        import jax

        from benchmarks import _gpu_checks as checks
        from decodax.kernels_pallas import hopper

        jax.config.update("jax_enable_compilation_cache", False)  # a cached program has no compiler output
        if options.any_cuda:
            hopper.cuda_version = lambda: None
        step, *of = options.child
        settings = checks.Settings(options.small, checks.read_limits(options.output))
        return getattr(checks, step)(*of, settings)

    child_outcome(options.outcome, run, options.limit)


def commit() -> str:
    """The commit of this checkout, "" where there is none."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    from decodax.kernels_pallas import KERNELS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the result file, JSON, whole at any time")
    parser.add_argument("--small", action="store_true", help="on CPU, interpreted, tiny: to see that it works")
    parser.add_argument("--kernel", choices=list(KERNELS), action="append", help="only this one (default: all)")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything")
    parser.add_argument("--jobs", type=int, help="checks at once, times apart (default: a third of the processors)")
    parser.add_argument("--any-cuda", action="store_true", help="run kernels on CUDA versions that they refuse, too")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--outcome", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.child:
        return run_child(options)
    end_on_sigterm()
    from decodax.kernels_pallas import KERNELS

    told = Options(options.output.resolve(), options.small, options.any_cuda)
    head = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "commit": commit()}
    head |= {"small": options.small, "any_cuda": options.any_cuda, "minutes": options.minutes}
    jobs = options.jobs or (1 if options.small else max(1, (os.cpu_count() or 1) // 3))
    checks = plan(told, options.kernel or list(KERNELS))
    records = run_checks(checks, told.output, head=head, seconds=60 * options.minutes, jobs=jobs)
    print(f"{summary(records)}; wrote {told.output}", flush=True)
    if any(record["status"] in FAILURES for record in records):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
