"""What layers run is said; a kernel that was asked for is refused, with all reasons, before weights are read."""

import dataclasses
import logging

import jax.numpy as jnp
import pytest

import decodax
from decodax.layers.execution import Execution
from decodax.models.layer_kernels import check_kernels, layer_kernels
from decodax.models.model import Model
from tests import model_kinds
from tests.golden_files import load_golden
from tests.tiny import tiny_config


@pytest.mark.parametrize("kind", model_kinds.LAYERS)
def test_every_layer_has_a_row_for_each_step(kind):
    config = model_kinds.model_of(kind).config
    rows = layer_kernels(Model(config), jnp.dtype("float32"), 2, 64, 1, 128)
    mixers = [row for row in rows if row.part == "mixer"]
    assert {row.step for row in mixers} == {"prompt", "decoding"}
    assert all(row.implementation == "xla" and row.reason for row in rows)  # on this CPU
    experts = [block for block in config.blocks if hasattr(block.feed_forward.layer, "router")]
    assert bool(experts) == any(row.part == "experts" for row in rows)


def test_the_reasons_of_all_layers_are_in_one_error():
    """Sizes and dtypes of prompt and decoding, once each."""
    model = Model(tiny_config(), execution=Execution("gpu"))
    with pytest.raises(NotImplementedError) as refused:
        check_kernels(model, jnp.dtype("float32"))
    message = str(refused.value)
    for reason in ("flash_prefill with", "flash_decode with", "bfloat16", "head size", "multiple of 16"):
        assert reason in message
    assert message.count("flash_prefill with") == 1 and message.endswith("load with implementation=None or 'xla'")
    check_kernels(dataclasses.replace(model, execution=Execution("xla")), jnp.dtype("float32"))
    check_kernels(dataclasses.replace(model, execution=Execution("tpu_interpreted")), jnp.dtype("float32"))


def test_load_refuses_it_before_it_reads_weights(monkeypatch):
    monkeypatch.setattr("decodax.models.load.read_params", None)
    with pytest.raises(NotImplementedError, match="flash_prefill with implementation='gpu'"):
        decodax.load(load_golden("llama").folder, implementation="gpu", dtype="float32")


def test_the_statistics_say_what_ran(caplog):
    """The reason is that of the device; in the invariant mode there are no kernels. A log tells the reasons, too."""
    folder = load_golden("llama").folder
    with caplog.at_level(logging.DEBUG, "decodax"):
        out = decodax.generate(decodax.load(folder), [[1, 2, 3]], max_new_tokens=2, strategy="prompt_lookup:5")
    assert [(row.layers, row.step, row.implementation) for row in out.stats.kernels] == [
        ("0..1 (2)", "prompt", "xla"),
        ("0..1 (2)", "decoding", "xla"),
    ]
    assert {row.reason for row in out.stats.kernels} == {"there are no kernels for cpu"}
    assert any("attention runs 'xla'; not kernel: there are no kernels for cpu" in text for text in caplog.messages)
    out = decodax.generate(decodax.load(folder, invariant=True), [[1, 2, 3]], max_new_tokens=2)
    assert {row.reason for row in out.stats.kernels} == {"the invariant mode runs no kernels"}
