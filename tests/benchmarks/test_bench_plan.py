"""The planner benchmark runs at a tiny size, and recovers the network rates from given all-reduce times."""

import json

import numpy as np
import pytest

from benchmarks import bench_plan
from decodax.planning.network import Ring, Switch
from decodax.sharding.rules import MESH_AXES

pytestmark = pytest.mark.slow


def test_at_a_tiny_size(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_plan, "ALL_REDUCE_SIZES", (1 << 12, 1 << 14))
    monkeypatch.setattr(bench_plan, "REPEATED", 3)
    monkeypatch.setattr(bench_plan, "degrees", lambda *_: [
        dict(zip(MESH_AXES, sizes, strict=True)) for sizes in ((1, 1, 1, 1, 8), (2, 1, 1, 1, 4))
    ])  # fmt: skip
    path = tmp_path / "result.json"
    bench_plan.main(["--size", "tiny", "--rounds", "1", "--output", str(path)])
    result = json.loads(path.read_text())["sizes"]["tiny"]
    assert set(result["meshes"]) == {"tensor=8", "tensor=4,data=2"}
    took = {mesh: one["measured ms"]["median"] for mesh, one in result["meshes"].items()}
    assert result["best"] == min(took, key=took.get) and result["chosen"] in took
    assert result["chosen over best"] == pytest.approx(took[result["chosen"]] / took[result["best"]])


def test_rates_are_recovered_from_times(monkeypatch):
    """All-reduces that take the times of a known switch give back that switch."""
    known = Switch(bandwidth=3e9, launch_seconds=40e-6, step_seconds=7e-6)
    monkeypatch.setattr(
        bench_plan, "all_reduce_seconds", lambda count, size: known.seconds("all-reduce", size, (Ring(count, True),))
    )
    found, listed = bench_plan.measured_network()
    assert len(listed) == 9
    for name in ("bandwidth", "launch_seconds", "step_seconds"):
        assert getattr(found, name) == pytest.approx(getattr(known, name), rel=1e-6)


def test_a_negative_coefficient_becomes_zero():
    matrix = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    assert bench_plan._not_negative(matrix, np.array([3.0, 2.0, 1.0])) == pytest.approx([2.0, 0.0])
