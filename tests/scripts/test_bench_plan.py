"""The benchmark of the planner's choice runs at a tiny size, and fits rates that it was given."""

import json

import numpy as np
import pytest

from decodax.scripts import bench_plan
from decodax.sharding.plan.network import Ring, Switch
from decodax.sharding.rules import MESH_AXES


def test_at_a_tiny_size(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_plan, "SUM_SIZES", (1 << 12, 1 << 14))
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


def test_rates_are_found_again(monkeypatch):
    """Sums that take what a switch says give back that switch."""
    told = Switch(bandwidth=3e9, launch_seconds=40e-6, step_seconds=7e-6)
    monkeypatch.setattr(
        bench_plan, "sum_seconds", lambda count, size: told.seconds("all-reduce", size, (Ring(count, True),))
    )
    found, listed = bench_plan.measured_network()
    assert len(listed) == 9
    for name in ("bandwidth", "launch_seconds", "step_seconds"):
        assert getattr(found, name) == pytest.approx(getattr(told, name), rel=1e-6)


def test_what_would_be_negative_is_left_out():
    matrix = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    assert bench_plan._not_negative(matrix, np.array([3.0, 2.0, 1.0])) == pytest.approx([2.0, 0.0])
