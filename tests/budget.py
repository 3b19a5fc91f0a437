"""What test files may take, checked with `pytest --budget`: the number of programs that XLA compiles for them.

Compiling is what tests spend their time on, and how many programs a file compiles depends on nothing but the file: that
is bounded. Seconds depend on the machine, and are shown.
"""

import hashlib
import os
import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

MAX_PROGRAMS = 700
_SHOWN = 12
_EVENT = "/jax/core/compile/backend_compile_duration"
_compiled = Counter()


def cache_folder() -> str:
    """Where compiled programs are kept: one folder for each version of JAX and kind of processor."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    base = os.environ.get("DECODAX_TEST_CACHE") or os.path.join(caches, "decodax-tests")
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        flags = platform.processor()
    kind = hashlib.sha256(flags.encode()).hexdigest()[:12]
    return os.path.join(base, f"jax-{jax.__version__}-{platform.machine()}-{kind}")


def _count(event: str, duration: float, **details: Any) -> None:
    if event == _EVENT:
        _compiled["programs"] += 1


def start() -> None:
    """Begins to count the programs that this process compiles, or finds in the cache of compiled programs."""
    jax.monitoring.register_event_duration_secs_listener(_count)


def num_programs() -> int:
    return _compiled["programs"]


def of_files(reports: Iterable[Any]) -> dict[str, tuple[float, int]]:
    """Of each file, seconds and programs, from the reports of its tests (set-up, call, and what comes after it)."""
    seconds: defaultdict[str, float] = defaultdict(float)
    programs: Counter[str] = Counter()
    for report in reports:
        file = report.nodeid.split("::")[0]
        seconds[file] += report.duration
        programs[file] += sum(value for name, value in report.user_properties if name == "programs") * (
            report.when == "teardown"
        )
    return {file: (seconds[file], programs[file]) for file in seconds}


def over_budget(files: Mapping[str, tuple[float, int]]) -> list[str]:
    """A line for every file that takes more than it may."""
    return [
        f"{file} compiles {programs} programs, and a file may compile {MAX_PROGRAMS}: share compiled functions between "
        "its tests, set up in NumPy, or split it"
        for file, (_, programs) in files.items()
        if programs > MAX_PROGRAMS
    ]


def table(files: Mapping[str, tuple[float, int]]) -> list[str]:
    """The files that take longest."""
    longest = sorted(files.items(), key=lambda item: -item[1][0])[:_SHOWN]
    return [f"{seconds:7.1f} s {programs:6} programs  {file}" for file, (seconds, programs) in longest]
