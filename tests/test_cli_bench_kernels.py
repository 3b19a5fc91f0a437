"""`decodax bench --kernels` reports which kernels would run, and runs nothing."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

import decodax
from decodax.cli import bench_kernels
from decodax.cli.app import app
from decodax.kernels_pallas import KERNELS, module_of, selection, shapes_of
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.rope import Rope
from decodax.models.configs.hf_config import load_config, read_config
from tests.golden_files import load_golden
from tests.models.test_published_sizes import PUBLISHED


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(decodax, "load", lambda *_, **__: pytest.fail("weights were loaded"))


@pytest.fixture
def on_hopper(monkeypatch):
    """Kernel selection sees a Hopper GPU."""
    monkeypatch.setattr(selection, "backend_of_this_device", lambda: ("gpu", "the device is a Hopper GPU"))


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "--kernels", *map(str, arguments)])


def test_the_document_names_every_kernel_and_every_layer():
    folder = load_golden("llama").folder
    result = run("--json", "--model", folder, "--batch", "3", "--prompt-tokens", 100)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [row["kernel"] for row in document["kernels"]] == list(KERNELS)
    assert {row["implementation"] for row in document["kernels"] + document["layers"]} == {"xla"}
    assert all("cpu" in row["reason"] for row in document["kernels"] + document["layers"])
    assert [row["step"] for row in document["layers"]] == ["prompt", "decoding"]
    assert document["model"] == {"name": folder.name, "dtype": "float32", "batch_size": 3, "prompt_tokens": 100}
    assert document["versions"]["jax"] == jax.__version__


def test_the_table_shows_kernels_and_layers(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = run()
    assert result.exit_code == 0, result.stderr
    assert all(kernel in result.stdout for kernel in KERNELS)
    assert "layers of demo" in result.stdout and "decoding" in result.stdout


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel_lists_the_backends_that_support_a_real_size(kernel):
    """Both kernels support the first named size of every kernel, and either can be selected."""
    shape = next(iter(shapes_of(kernel).values()))
    assert bench_kernels.unsupported_reasons(kernel, shape) == [None, None]
    assert bench_kernels.select(kernel, shape, "gpu").implementation == "gpu"


def test_a_hopper_gpu_gets_kernels_or_the_reason_why_not(on_hopper):
    assert {row.implementation for row in bench_kernels.kernel_selections()} == {"gpu"}
    _, config = load_config(load_golden("llama").folder)
    for row in bench_kernels.layer_selections(config, "bfloat16", 1, 100, 5):
        # The tiny model's heads fit no kernel, and the reason says so.
        assert row.implementation == "xla" and "Hopper" in row.reason and "head" in row.reason
    mixers = [GQAConfig(32, 8, 128, Rope(128, 1e4), scale=0.1, window=window) for window in (None, None, 512)]
    blocks = tuple(config.blocks[0].with_mixer(mixer) for mixer in mixers)
    rows = bench_kernels.layer_selections(dataclasses.replace(config, blocks=blocks), "bfloat16", 1, 100, 924)
    assert [(row.layers, row.step) for row in rows] == [
        *(("0..1 (2)", step) for step in ("prompt", "decoding")),
        *(("2", step) for step in ("prompt", "decoding")),
    ]
    assert {(row.implementation, row.reason) for row in rows} == {("gpu", "the device is a Hopper GPU")}


def test_experts_latents_and_states_have_lines_of_their_own(on_hopper):
    """For the kernels that real sizes would run."""
    rows = {}
    for name in ("DeepSeek-V2-Lite, arXiv 2405.04434", "MiniMax-Text-01, arXiv 2501.08313", "Qwen3-Next-80B-A3B"):
        config = read_config(PUBLISHED[name][0])[1]
        chosen = bench_kernels.layer_selections(config, "bfloat16", 8, 512, 512)
        rows[name[:7]] = {(row.part, row.layers.split()[0], row.step): row.implementation for row in chosen}
    assert set(rows["DeepSee"].values()) == {"gpu"}
    assert {part for part, _, _ in rows["DeepSee"]} == {"mixer", "experts"}
    slopes = {key: value for key, value in rows["MiniMax"].items() if key[:2] == ("mixer", "0")}  # a layer of its own
    assert slopes == {("mixer", "0", "prompt"): "gpu", ("mixer", "0", "decoding"): "xla"}
    delta = {key[2]: value for key, value in rows["Qwen3-N"].items() if key[:2] == ("mixer", "0..46")}
    assert delta == {"prompt": "xla", "decoding": "xla"}  # there is no kernel for the delta rule


def test_unsupported_reasons_are_reported(monkeypatch):
    shape = next(iter(shapes_of("flash_decode").values()))

    class Wide:
        def operands(self):
            cast = lambda leaf: leaf if leaf.dtype != jnp.bfloat16 else jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
            return jax.tree.map(cast, shape.operands())

        def options(self):
            return shape.options()

    tpu, gpu = bench_kernels.unsupported_reasons("flash_decode", Wide())
    assert tpu is None and "float32" in gpu and "xla" in gpu
    assert module_of("flash_decode").__name__.endswith("flash_decode")
