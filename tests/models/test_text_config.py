"""Multimodal folders give their text model; the other parts are named and left out."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import decodax
from decodax.models.checkpoints.write_hf import to_hf
from decodax.models.configs.hf_config import read_config
from tests.golden_files import load_golden

GOLDEN = load_golden("gemma3_text").folder


def multimodal(folder, rename, **changed):
    """The golden model as part of another, with a tower beside it."""
    text = json.loads((GOLDEN / "config.json").read_text())
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 7}, "image_token_index": 3}
    (folder / "config.json").write_text(json.dumps(config | changed))
    tensors = {rename(name): array for name, array in load_file(GOLDEN / "model.safetensors").items()}
    towers = {"vision_tower.patch.weight": np.ones((2, 3)), "multi_modal_projector.norm.weight": np.ones(2)}
    inner = rename("model.x").startswith("model.language_model.")
    save_file(
        tensors | {("model." if inner else "") + name: array.astype(np.float32) for name, array in towers.items()},
        folder / "model.safetensors",
    )
    return folder


def old(name):
    """As transformers 4 named the tensors of the text model."""
    return f"language_model.{name}"


def new(name):
    """As transformers 5 does."""
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


@pytest.mark.parametrize("rename", [old, new])
def test_the_text_model_is_that_alone(tmp_path, rename):
    note = "read as its text model (gemma3_text), without what vision_config describe"
    with pytest.warns(UserWarning, match=re.escape(note)):
        lm = decodax.load(multimodal(tmp_path, rename))
    alone = decodax.load(GOLDEN)
    assert lm.config == alone.config
    jax.tree.map(np.testing.assert_array_equal, lm.params, alone.params)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_converting_writes_the_text_model(tmp_path):
    (tmp_path / "all").mkdir()
    to_hf(multimodal(tmp_path / "all", new), tmp_path / "text")
    written, known = (load_file(folder / "model.safetensors") for folder in (tmp_path / "text", GOLDEN))
    assert written.keys() == known.keys()
    for name, array in known.items():
        np.testing.assert_array_equal(written[name], array)
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == "gemma3_text"


def test_an_unknown_text_model_is_named():
    raw = {"model_type": "seer", "text_config": {"model_type": "oracle_text"}}
    with pytest.raises(ValueError, match=r'got "oracle_text", the text_config of a "seer" model'):
        read_config(raw)
