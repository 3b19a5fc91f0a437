"""The decoding benchmarks run at a tiny size, gate on equal tokens, and give the same weights to every contestant."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _bench_common as common
from benchmarks import _bench_peers as peers
from benchmarks import bench_decode, bench_gpu

pytestmark = pytest.mark.slow

SHAPE = bench_decode.SHAPES["tiny"]


def test_bench_decode_at_a_tiny_size(tmp_path):
    path = tmp_path / "result.json"
    without = ["--without", "transformers", "--without", "llama.cpp"]
    bench_decode.main(["--size", "tiny", *without, "--output", str(path)])
    result = json.loads(path.read_text())
    alone, deep = result["alone"], result["deep"]
    assert alone["same_tokens"] == bench_decode.SETTINGS["tiny"].new
    assert alone["measured"]["decodax"]["tokens/s"]["median"] > 0
    assert deep["capacity"] >= max(bench_decode.SETTINGS["tiny"].lengths)
    assert set(deep["attention_gb_per_s"]) == {"512"}
    assert result["date"] and result["device"] and result["versions"]["jax"]


def test_bench_gpu_at_a_tiny_size(tmp_path):
    path = tmp_path / "result.json"
    bench_gpu.main(["--size", "tiny", "--rounds", "1", "--without", "transformers", "--output", str(path)])
    result = json.loads(path.read_text())
    for batch in bench_gpu.BATCHES["tiny"]:
        assert result["batch"][str(batch)]["decodax"]["compile_seconds"]["median"] > 0


def test_gate_refuses_a_contestant_with_other_tokens():
    model = SHAPE.model()
    params = common.random_params(model, seed=0)
    prompt = np.array([3, 1, 4, 1, 5], np.int32)
    ours = bench_decode.decodax_contestant(model, params)

    def wrong(prompt, num_new):
        tokens, speed = ours(prompt, num_new)
        return np.where(np.arange(num_new) == num_new - 1, tokens + 1, tokens), speed

    bench_decode.check(model, params, prompt, 6, {"decodax": ours})
    with pytest.raises(SystemExit, match="other"):
        bench_decode.check(model, params, prompt, 6, {"decodax": ours, "other": wrong})
    with pytest.raises(SystemExit, match="decodax"):
        bench_decode.check(model, params, prompt, 6, {"decodax": wrong})


def test_every_weight_goes_to_the_peers_once():
    model = SHAPE.model()
    params = common.random_params(model, seed=0)
    named = peers.named_weights(params, SHAPE.num_layers)
    assert sorted(id(array) for *_, array in named) == sorted(id(leaf) for leaf in jax.tree.leaves(params))
    for names in zip(*((theirs, gguf) for theirs, gguf, _ in named), strict=True):
        assert len(set(names)) == len(named)


def test_weight_bytes_are_those_a_step_reads():
    params = common.random_params(SHAPE.model(), seed=0)
    # Per layer 2 norms, 32 x 32 for query and out, 16 x 32 for key and value, 3 times 48 x 32; final norm; head.
    numbers = 2 * (2 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32) + 32 + 211 * 32
    assert common.weight_bytes_read(params) == 4 * numbers


@pytest.mark.parametrize("rows", [5, 1200])
def test_weights_as_loaded_hold_the_same_values(rows):
    array = jax.random.normal(jax.random.key(0), (rows, 1024))
    moved = common.as_loaded(array)
    np.testing.assert_array_equal(moved, array)
    assert moved.dtype == jnp.float32


def test_alternation_leaves_out_the_warm_up():
    calls = []

    def contestant(name):
        calls.append(name)
        return {"speed": float(len(calls))}

    runs = {name: lambda name=name: contestant(name) for name in "ab"}
    measured = common.alternate(runs, rounds=3, pause_s=0.0)
    assert calls == list("abababab")
    assert measured == {"a": {"speed": [3.0, 5.0, 7.0]}, "b": {"speed": [4.0, 6.0, 8.0]}}
    assert common.summary(measured["a"]["speed"]) == {"median": 5.0, "min": 3.0, "max": 7.0}
