"""The expert benchmarks run at a tiny size, and compare with a dense model of a token's active parameters."""

import json

import jax
import pytest

from benchmarks import bench_experts, bench_experts_gpu
from decodax.layers.moe.layer import MoEConfig

pytestmark = pytest.mark.slow


def test_on_cpu_at_a_tiny_size(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_experts, "BATCHES", (3,))  # which the gate has compiled
    path = tmp_path / "result.json"
    bench_experts.main(["--size", "tiny", "--rounds", "1", "--without", "transformers", "--output", str(path)])
    result = json.loads(path.read_text())
    for batch in bench_experts.BATCHES:
        measured = result["batch"][str(batch)]
        assert measured["decodax"]["tokens/s"]["median"] > 0 and measured["times_dense"] > 0
        assert measured["times_transformers"] is None


@pytest.mark.parametrize("size", bench_experts.SIZES)
def test_the_dense_model_has_the_active_parameters_of_a_token(size):
    """Feed-forward weights of the dense model, and of the experts that a token chooses."""
    mixture = bench_experts.read_config(bench_experts.fields(size))[1]
    router = mixture.blocks[0].feed_forward.layer.router
    active = 0
    for block in mixture.blocks:
        assert isinstance(block.feed_forward.layer, MoEConfig)
        experts = block.feed_forward.layer.weights(mixture.hidden_size)["experts"]
        active += sum(weight.shape[1] * weight.shape[2] for weight in experts.values()) * router.experts_per_token
    if size == "tiny":
        params = bench_experts.dense_model(size).params
        mlps = [leaf for name, block in params.items() if "blocks" in name for leaf in block["feed_forward"].values()]
        assert sum(leaf.size for leaf in mlps) == active
    else:
        wide = bench_experts.fields(size)["intermediate_size"]
        assert 3 * wide * mixture.hidden_size * mixture.num_layers == active


def test_on_a_gpu_at_a_tiny_size(capsys, monkeypatch):
    """The gate, and one round that is used for both dispatch algorithms."""
    monkeypatch.setitem(bench_experts_gpu.BATCHES, "tiny", (1,))
    bench_experts_gpu.check("tiny")
    turn = bench_experts_gpu.measure("tiny", "kernels")
    result = bench_experts_gpu.report("tiny", {kernels: [turn] for kernels in bench_experts_gpu.WITH})
    for batch in bench_experts_gpu.BATCHES["tiny"]:
        for kernels in bench_experts_gpu.WITH:
            assert 0 < result[str(batch)][kernels]["of roofline"]["median"] < 100
    assert "bfloat16" in capsys.readouterr().out


def test_a_step_reads_the_experts_that_are_chosen():
    model = bench_experts_gpu.model_of("tiny", "xla")
    params = bench_experts_gpu.common.random_params(model, seed=0)
    state = bench_experts_gpu.started(model, params, "tiny", 1)
    routes = jax.jit(bench_experts_gpu.step, static_argnums=0)(model, params, state)[1]
    read = bench_experts_gpu.step_bytes(model, params, state, routes)
    experts = sum(leaf.nbytes for leaf in jax.tree.leaves(params["blocks_1"]["feed_forward"]["experts"]))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - params["embedding"].nbytes
    cached = 2 * (16 + 4) * 4 * 7  # layers, latent size, bytes, tokens
    assert read == pytest.approx(total - experts * 6 / 8 + cached)
