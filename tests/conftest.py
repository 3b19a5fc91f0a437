"""A strict session for every test, set up before JAX starts.

- Annotations are checked: jaxtyping and beartype compare every call into decodax with the shapes and types it declares,
  so an axis that comes out in the wrong place fails where it happens.
- Nothing is converted silently: no mixing of dtypes, no broadcasting between arrays of different rank.
- Eight CPU devices, so that code for meshes runs on a laptop, and exact float32 products, so that tolerances mean
  something on every platform.
- Operations of a device run one after the other: side by side, devices may wait for each other in different
  collectives for ever (seen on JAX 0.10.2 with eight CPU devices on two cores; not on 0.12).
- XLA optimises little: most of the time goes into compiling, and it halves that. What the results are must not depend
  on it.

Warnings are errors by `filterwarnings` in pyproject.toml.

What a test file has compiled is dropped after it. Ctrl-C is heard even where a script started the session in the
background, so that tests of it mean something.
"""

import gc
import os
import signal

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_enable_concurrency_optimized_scheduler=false " + os.environ.get("XLA_FLAGS", "")
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest
from jaxtyping import install_import_hook

from tests import annotation_checker

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

install_import_hook("decodax", f"{annotation_checker.__name__}.{annotation_checker.check.__name__}")


@pytest.fixture
def optax_may_promote():
    """optax's bias correction multiplies float32 by an integer count, a mixture that this session forbids elsewhere."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Each program that XLA compiles on CPU holds memory maps, of which Linux gives a process 65,530 by default."""
    yield
    jax.clear_caches()
    gc.collect()


def pytest_terminal_summary(terminalreporter):
    """Prints what tests have counted (`record_property("fuzz", ...)`), also where other processes ran them."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    for report in reports:
        for name, value in report.user_properties:
            if name == "fuzz" and report.when == "call":
                terminalreporter.write_line(f"fuzz {value}")
