"""A strict session for every test, set up before JAX starts.

- Annotations are checked: jaxtyping and beartype compare every call into decodax with the shapes and types it declares,
  so an axis that comes out in the wrong place fails where it happens.
- Nothing is converted silently: no mixing of dtypes, no broadcasting between arrays of different rank.
- Eight CPU devices, so that code for meshes runs on a laptop, and exact float32 products, so that tolerances mean
  something on every platform.
- Operations of a device run one after the other: side by side, devices may wait for each other in different
  collectives for ever (seen on JAX 0.10.2 with eight CPU devices on two cores; not on 0.12).
- XLA optimises little, and where it still can (JAX 0.10) emits code for fused operations in the older, plainer way:
  most of the time goes into compiling, and either halves that. What the results are must not depend on it.

Warnings are errors by `filterwarnings` in pyproject.toml.

Compiled programs are kept in a folder that all workers share, and that later runs find again where the machine keeps
it: `decodax-tests` in the user's cache folder, or DECODAX_TEST_CACHE. What tests measure of compiling runs in processes
of their own. Within a process, programs are dropped only when memory maps run short.

Ctrl-C is heard even where a script started the session in the background, so that tests of it mean something.
"""

import gc
import hashlib
import os
import signal
from collections import defaultdict
from importlib.metadata import version

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_enable_concurrency_optimized_scheduler=false --xla_cpu_parallel_codegen_split_count=1 "
    # Later versions do not know this one, and end the process.
    + ("--xla_cpu_use_fusion_emitters=false " if version("jaxlib").startswith("0.10.") else "")
    + os.environ.get("XLA_FLAGS", "")
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest
from jaxtyping import install_import_hook

from tests import annotation_checker, budget

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
# By configuration and not by environment: processes that tests start decide for themselves.
jax.config.update("jax_compilation_cache_dir", budget.cache_folder())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")

install_import_hook("decodax", f"{annotation_checker.__name__}.{annotation_checker.check.__name__}")


budget.start()


@pytest.fixture(autouse=True)
def count_programs(request):
    """Notes how many programs the test, and the fixtures of its file that it was the first to need, compiled."""
    before = getattr(request.config, "_programs_seen", 0)
    yield
    request.config._programs_seen = budget.num_programs()
    request.node.user_properties.append(("programs", budget.num_programs() - before))


@pytest.fixture
def optax_may_promote():
    """optax's bias correction multiplies float32 by an integer count, a mixture that this session forbids elsewhere."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# Linux gives a process 65,530 memory maps by default, and each program that XLA compiles on CPU holds about 200.
_MOST_MAPS, _MOST_BYTES = 40_000, 3 * 2**30


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Drops what was compiled when the memory maps of the process run short, or its memory grows large."""
    yield
    try:
        with open("/proc/self/maps", "rb") as lines:
            num_maps = sum(1 for _ in lines)
        with open("/proc/self/statm") as numbers:
            resident_bytes = int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        num_maps, resident_bytes = _MOST_MAPS, 0
    if num_maps >= _MOST_MAPS or resident_bytes > _MOST_BYTES:
        jax.clear_caches()
        gc.collect()


def pytest_addoption(parser):
    parser.addoption("--sample", metavar="N", type=int, help="run N of the tests only, drawn by --sample-seed")
    parser.addoption("--budget", action="store_true", help="fail where a file takes more than tests/budget.py allows")
    parser.addoption("--sample-seed", default="", help="any text: the same text draws the same tests")


class Cases:
    """Marks the cases beyond those of `quick_cases` as slow, before -m and -k select."""

    @staticmethod
    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(items):
        cases = defaultdict(list)
        for item in items:
            if item.get_closest_marker("quick_cases") and not item.get_closest_marker("slow"):
                cases[item.nodeid.split("[")[0]].append(item)
        for same in cases.values():
            (quick,), total = same[0].get_closest_marker("quick_cases").args, len(same)
            for index, item in enumerate(same):
                if (index + 1) * quick // total == index * quick // total:
                    item.add_marker(pytest.mark.slow)


def pytest_configure(config):
    config.pluginmanager.register(Cases)


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    """With --sample, keeps the N tests whose names have the lowest hashes with the seed: the same in every worker."""
    count = config.getoption("--sample")
    if count is not None:
        seed = config.getoption("--sample-seed")
        drawn = sorted(items, key=lambda item: hashlib.sha256(f"{seed} {item.nodeid}".encode()).digest())[:count]
        config.hook.pytest_deselected(items=[item for item in items if item not in drawn])
        items[:] = [item for item in items if item in drawn]


def pytest_terminal_summary(terminalreporter):
    """Prints what tests have counted (`record_property("fuzz", ...)`), and which files took longest."""
    reports = [report for kind in ("passed", "failed", "") for report in terminalreporter.getreports(kind)]
    for report in reports:
        for name, value in report.user_properties:
            if name == "fuzz" and report.when == "call":
                terminalreporter.write_line(f"fuzz {value}")
    if terminalreporter.config.getoption("--budget"):
        files = budget.of_files(reports)
        for line in (*budget.table(files), *budget.over_budget(files)):
            terminalreporter.write_line(line)


def pytest_sessionfinish(session, exitstatus):
    """With --budget, a session of passing tests fails where a file is over it. Workers leave that to the session."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == 0 and reporter is not None and session.config.getoption("--budget"):
        reports = [report for kind in ("passed", "") for report in reporter.getreports(kind)]
        if budget.over_budget(budget.of_files(reports)):
            session.exitstatus = 1
