"""A LoRA adapter that cannot be merged is refused in one line that says why; where one may be, and its names."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import decodax
from decodax.decoding.auxiliary_weights import AuxiliaryWeights
from decodax.models.checkpoints.adapters.files import open_adapter
from decodax.models.checkpoints.conversion import open_source
from decodax.models.checkpoints.write_orbax import from_hf
from tests.golden_adapter_files import GOLDEN, LLAMA, change, copy_adapter, refused
from tests.golden_files import load_golden

QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    return copy_adapter("second", tmp_path / "mine")


def replace_tensors(folder, **tensors):
    """Replaces tensors of the first layer's q_proj, by the end of their names; None removes one."""
    file = folder / "adapter_model.safetensors"
    stored = load_file(file) | {f"{QUERY}.{name.replace('__', '.')}": value for name, value in tensors.items()}
    save_file({name: value for name, value in stored.items() if value is not None}, file)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"lora_A__weight": None}, "has lora_B of model.layers.0.self_attn.q_proj, expected lora_A and lora_B"),
        ({"lora_A__default__weight": np.ones((2, 30), np.float32)}, r"lora_A\.\S*weight in .* is there twice"),
        ({"lora_magnitude_vector": np.ones(48, np.float32)}, "q_proj.lora_magnitude_vector in .* is not understood"),
        ({"lora_A__weight": np.full((2, 30), np.nan, np.float32)}, "lora_A.weight in .* holds NaN or infinity"),
        ({"lora_B__weight": np.full((48, 2), np.inf, np.float32)}, "lora_B.weight in .* holds NaN or infinity"),
        ({"lora_A__weight": np.ones((2, 30), np.int32)}, r"must hold floating-point numbers \(.*\), got I32"),
        ({"lora_A__weight": np.ones((2, 3, 10), np.float32)}, r"lora_A \[2, 3, 10\] and lora_B \[48, 2\]"),
        (
            {"lora_A__weight": np.ones((2, 31), np.float32)},
            r"mine has matrices for model.layers.0.self_attn.q_proj.weight \[48, 31\], and the model's "
            r"model.layers.0.self_attn.q_proj.weight is \[48, 30\]: was it trained for another model "
            r"\(adapter_config.json names org/llama\)\?",
        ),
        ({"weight": np.ones((47, 30), np.float32)}, r"q_proj.weight \[47, 30\], and the model's .* is \[48, 30\]: was"),
    ],
)
def test_tensors_that_are_refused(folder, tensors, match):
    replace_tensors(folder, **tensors)
    refused(folder, match)


def test_an_adapter_of_another_model(folder):
    change(folder, base_model_name_or_path="org/\x1bother")
    refused(
        folder,
        r"changes model.layers.0.mlp.gate_proj.weight \[\d+, 30\], which the model does not have: was it trained for "
        r"another model \(adapter_config.json names org/\\x1bother\)\?",
        model=load_golden("phi3").folder,
    )
    refused(folder, r"matrices for model.layers.*\[\d+, \d+\], and the model's", model=load_golden("llama_tied").folder)
    refused(folder, "which the model does not have: was it trained", model=load_golden("gpt2").folder)


def test_experts_that_do_not_fit(tmp_path):
    """Of stacked experts, and of those that the model has in one tensor each."""
    for case, name in (("stacked_experts", "mixtral"), ("separate_experts", "qwen3_moe")):
        folder = copy_adapter(case, tmp_path / case)
        file = folder / "adapter_model.safetensors"
        experts = "base_model.model.model.layers.1.mlp.experts"
        stored = load_file(file)
        rank = 2  # of down_proj
        fewer = {f"{experts}.lora_A.weight": stored[f"{experts}.lora_A.weight"][:-rank].copy()}
        fewer[f"{experts}.lora_B.weight"] = stored[f"{experts}.lora_B.weight"][:, :-rank].copy()
        save_file(stored | fewer, file)
        count = len(stored[f"{experts}.lora_A.weight"]) // rank
        model, found = load_golden(name).folder, count - 1
        match = (
            rf"\[{found}, .*, and the model's .* is \[{count}, |for {found} experts of .* the model has {count}: was"
        )
        refused(folder, match, model=model)
        save_file(stored | {f"{experts}.lora_A.weight": fewer[f"{experts}.lora_A.weight"][:-1].copy()}, file)
        refused(folder, r"of model.layers.1.mlp.experts, expected \[2, inputs\]", model=model)
        save_file(stored | {f"{experts}.base_layer.base_layer.lora_A.weight": fewer[f"{experts}.lora_A.weight"]}, file)
        refused(folder, "has lora_A of model.layers.1.mlp.experts.base_layer.base_layer", model=model)


def test_missing_files(folder, tmp_path):
    (folder / "adapter_model.safetensors").rename(tmp_path / "weights")
    refused(folder, "mine has neither adapter_model.safetensors nor adapter_model.bin", FileNotFoundError)
    (tmp_path / "weights").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").unlink()
    refused(folder, "mine has no adapter_config.json", FileNotFoundError)
    (folder / "adapter_config.json").write_text("[]")
    refused(folder, "adapter_config.json must hold a JSON object, got a list")
    refused(tmp_path / "nowhere", "nowhere", FileNotFoundError)


def test_modules_without_matrices_are_named(folder):
    change(folder, target_modules=["q_proj", "gate_proj", "up_proj"])
    words = r"names modules for which the adapter has no matrices.*: model.layers.0.mlp.up_proj.weight, model.layers.1"
    with pytest.warns(UserWarning, match=words):
        decodax.load(LLAMA, adapter=folder)


def test_an_orbax_base_is_refused(folder, tmp_path):
    from_hf(LLAMA, tmp_path / "orbax")
    refused(folder, "is an Orbax checkpoint, .* `decodax convert --adapter`", model=tmp_path / "orbax")


def test_the_names_of_a_wrapper(folder, tmp_path):
    """An adapter of a model inside another, as of the text model of one that sees images, and the other way round."""
    stored = load_file(folder / "adapter_model.safetensors")
    wrapped = {name.replace("model.model.model", "model.model.language_model"): value for name, value in stored.items()}
    save_file(wrapped, folder / "adapter_model.safetensors")
    found, plain = (
        decodax.load(LLAMA, adapter=place).params["blocks_1"]["mixer"]["query"] for place in (folder, GOLDEN / "second")
    )
    np.testing.assert_array_equal(found, plain)
    model = Path(shutil.copytree(LLAMA, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    save_file({f"language_model.{name}": value for name, value in tensors.items()}, model / "model.safetensors")
    with pytest.warns(UserWarning, match="names of something that wraps the model"):
        found = decodax.load(model, adapter=GOLDEN / "second").params["blocks_1"]["mixer"]["query"]
    np.testing.assert_array_equal(found, plain)


def test_it_may_be_beside_its_model_or_inside(folder, tmp_path):
    plain = decodax.load(LLAMA, adapter=folder).params["blocks_1"]["mixer"]["query"]
    model = Path(shutil.copytree(LLAMA, tmp_path / "model"))
    shutil.copytree(folder, model / "inside")
    for name in folder.iterdir():
        shutil.copy(name, model)
    for adapter in (model, "inside"):
        if adapter == "inside":
            with pytest.warns(UserWarning, match="is not applied"):
                lm = decodax.load(model, adapter=adapter)
        else:
            lm = decodax.load(model, adapter=adapter)
        np.testing.assert_array_equal(lm.params["blocks_1"]["mixer"]["query"], plain)


def test_only_the_last_may_be_an_auxiliary_weights(folder):
    own = AuxiliaryWeights("layer_skip", {}, {})
    with pytest.raises(ValueError, match=r"adapter must be LoRA adapters .* of which only the last"):
        decodax.load(LLAMA, adapter=[own, folder])
    with pytest.raises(ValueError, match="of which only the last"):
        decodax.load(LLAMA, adapter=[own, own])


def test_a_loaded_model_is_not_converted_with_adapters(folder):
    with pytest.raises(ValueError, match="pass its folder, not the model"):
        open_source(decodax.load(LLAMA), [folder])


def test_a_damaged_pickle_is_refused(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")
    refused(folder, "adapter_model.bin cannot be read as PyTorch weights: it is no zip archive")


def test_the_adapter_is_open_without_being_read(folder):
    adapter = open_adapter(folder)
    assert len(adapter.low_rank) == 4 and not adapter.whole
    assert re.fullmatch(r"was it trained for another model \(adapter_config.json names org/llama\)\?", adapter.origin)
