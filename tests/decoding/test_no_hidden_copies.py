"""XLA compiles the decoding loops to write caches in place, without copies or buffers as large as a cache.

Read from the compiled HLO: an instruction that copies or transposes an array as large as a cache, or that needs
temporary memory like one, would cost a pass over the whole cache at every token. The programs are those of users: one
process with one device and without the test session's flags for XLA compiles them all (hidden_copies.py).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import budget
from tests.decoding.hidden_copies import CARELESS, CASES

ROOT = Path(__file__).resolve().parents[2]
SESSION = ("XLA_", "JAX_", "LIBTPU_", "DECODAX_")  # variables that a session of tests, or its surroundings, may set


@pytest.fixture(scope="module")
def found():
    """What the process found in every case."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(SESSION)}
    # Programs of the session are not found there: other flags, other keys.
    kept = {"JAX_COMPILATION_CACHE_DIR": budget.cache_folder(), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    own |= kept | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "tests.decoding.hidden_copies"]
    done = subprocess.run(
        command, cwd=ROOT, env=own, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["session"] == {"devices": 1, "flags": ""}
    assert list(document["results"]) == [*CASES, CARELESS]
    return document["results"]


@pytest.mark.parametrize("name", CASES)
def test_caches_are_written_in_place(name, found):
    assert found[name] == []


def test_the_check_sees_copies(found):
    """Where they are known to occur: in a commit that does not depend on its reads."""
    assert any(re.search(r" (copy|copy-start|transpose)\(", line) for line in found[CARELESS])
    assert any("bytes of temporaries" in line for line in found[CARELESS])
