"""The benchmark of refilled batches runs at a tiny size, and gates on equal tokens."""

import json

import pytest

from benchmarks import bench_many_prompts


@pytest.mark.slow
def test_at_a_tiny_size(tmp_path):
    path = tmp_path / "result.json"
    bench_many_prompts.main(["--size", "tiny", "--output", str(path)])
    result = json.loads(path.read_text())
    assert set(result["measured"]) == {"spread", "equal"} and all(
        ratio > 0 for ratio in result["spread of equal"].values()
    )
    assert result["measured"]["equal"]["forwards"]["median"] > 0 and result["versions"]["jax"]
