"""A LoRA adapter in a model's folder: beside the weights it causes a warning, alone it is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from decodax.models.load import load
from tests.golden_files import load_golden

CHANGE = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 30), np.float32)}


def add_adapter(folder, settings="{}", weights="adapter_model.safetensors"):
    (folder / "adapter_config.json").write_text(settings)
    save_file(CHANGE, folder / weights)
    return folder


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_beside_a_model(tmp_path, weights):
    folder = add_adapter(Path(shutil.copytree(load_golden("llama").folder, tmp_path / "model")), weights=weights)
    words = rf"adapter in .*model \(adapter_config.json, {weights}\) is not applied.*: pass the folder as adapter"
    with pytest.warns(UserWarning, match=words) as said:
        load(folder)
    assert len(said) == 1


@pytest.mark.parametrize("has_config", [False, True])
def test_alone(tmp_path, has_config):
    settings = json.dumps({"base_model_name_or_path": "org/\x1b[2Jbase"})
    folder = add_adapter(tmp_path, settings)
    if has_config:
        shutil.copy(load_golden("llama").folder / "config.json", folder)
    with pytest.raises(
        FileNotFoundError,
        match=r"a LoRA adapter alone .* trained for org/\\x1b\[2Jbase: load the model with it, decodax.load",
    ):
        load(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"LoRA adapter alone \(adapter_model.safetensors\), and no model: load the model with it",
    ):
        load(folder)
    (folder / "adapter_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"adapter_config.json is no valid JSON"):
        load(folder)
