"""Host memory of a process that loads its shard: the measurement counts it fully, and a shard takes little more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import measure_loading

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's accounting"),
]
LIMIT_BYTES = 0.5e9  # peak of a process that loads its eighth of 2 GB, everything in its memory counted


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_two_processes_hold_halves(tmp_path, monkeypatch, form):
    for name, size in {"HIDDEN": 128, "FEED_FORWARD": 512, "VOCABULARY": 64}.items():
        monkeypatch.setattr(measure_loading, name, size)
    folder = measure_loading.random_model(tmp_path / "random", 8, form)
    rows = measure_loading.run(folder, 2)
    assert [row["process"] for row in rows] == [0, 1]
    norms = 2 * 128 * (2 * 8 + 1)  # replicated in both
    for row in rows:
        assert row["own_bytes"] == (row["model_bytes"] - norms) / 2 + norms
        assert row["peak_bytes"] >= row["before_bytes"] > 0


@pytest.mark.slow
def test_an_eighth_of_2_gigabytes_takes_less_than_half_a_gigabyte():
    command = [sys.executable, "-m", "benchmarks.measure_loading", "--json"]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout)
    assert len(rows) == 8
    for row in rows:
        assert row["model_bytes"] > 2e9 and row["own_bytes"] > 0.25e9
        assert row["before_bytes"] + row["own_bytes"] < row["peak_bytes"] < LIMIT_BYTES, row
