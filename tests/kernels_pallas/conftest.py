"""Marks interpreted GPU kernels as slow under JAX 0.10, whose interpreter compiles a body for every program.

The interpreter of JAX 0.12 does not, and there they run with the rest (`.ci/run` does so).
"""

from pathlib import Path

import jax
import pytest

FOLDER, INTERPRETED = Path(__file__).parent, "gpu_interpreted"
ALL_INTERPRETED = "test_decode_kernels_gpu.py"


@pytest.hookimpl(tryfirst=True)  # before deselection by marks
def pytest_collection_modifyitems(items):
    if jax.__version_info__ >= (0, 11):
        return
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if item.path.parent == FOLDER and (item.path.name == ALL_INTERPRETED or INTERPRETED in values):
            item.add_marker(pytest.mark.slow)
