"""A GGUF file is converted into a folder that holds the same model, by the library and by the command line."""

import json
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

import decodax
from decodax.cli.app import app
from decodax.models.checkpoints.write_hf import to_hf
from decodax.models.checkpoints.write_orbax import from_hf
from tests.gguf_files import QUANTISED, write_case
from tests.golden_files import load_golden


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def quantised():
    return decodax.load(QUANTISED, dtype="float32")


def check_same(folder, lm):
    found = decodax.load(folder, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, found.params, lm.params)
    assert found.config == lm.config and found.end_token_ids == lm.end_token_ids
    for text in ("the a<|im_end|>12 \u00e9", ""):
        assert found.tokenizer.encode(text) == lm.tokenizer.encode(text)
    return found


def test_a_folder_holds_the_same_model(quantised, tmp_path):
    to_hf(QUANTISED, tmp_path / "hf")
    check_same(tmp_path / "hf", quantised)
    assert (tmp_path / "hf" / "chat_template.jinja").read_text().startswith("{% for message in messages %}")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["torch_dtype"] == "float32"
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert settings["bos_token"] == "<|im_start|>" and settings["eos_token"] == "<|im_end|>"
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == np.float16  # as in the file
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == np.float32
    again = to_hf(QUANTISED, tmp_path / "hf")
    assert again.resumed_bytes == again.manifest["num_bytes"]


def test_orbax_arrays_and_a_loaded_model_hold_the_same_model(quantised, tmp_path):
    from_hf(QUANTISED, tmp_path / "orbax", dtype="float32")
    check_same(tmp_path / "orbax", quantised)
    to_hf(quantised, tmp_path / "loaded")
    check_same(tmp_path / "loaded", quantised)


def test_experts_become_a_matrix_each_or_one_stack_as_the_family_has_them(tmp_path):
    for case in ("mixtral", "gpt_oss"):
        to_hf(write_case(tmp_path / f"{case}.gguf", case), tmp_path / case)
        golden = decodax.load(load_golden(case).folder).params
        jax.tree.map(np.testing.assert_array_equal, decodax.load(tmp_path / case).params, golden)
    assert "model.layers.2.block_sparse_moe.experts.4.w2.weight" in load_file(
        tmp_path / "mixtral" / "model.safetensors"
    )
    assert "model.layers.2.mlp.experts.gate_up_proj" in load_file(tmp_path / "gpt_oss" / "model.safetensors")


def test_the_file_is_not_replaced_by_its_conversion(tmp_path):
    path = write_case(tmp_path / "model.gguf", "qwen2")
    with pytest.raises(FileExistsError, match="is there already and is no folder"):
        to_hf(path, path, overwrite=True)
    with pytest.raises((FileExistsError, ValueError), match="holds"):
        to_hf(path, tmp_path, overwrite=True)
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_the_commands_take_a_file(tmp_path):
    done = run("convert", QUANTISED, "-o", tmp_path / "out", "--verify")
    assert done.exit_code == 0, done.output
    assert "out: Hugging Face folder" in done.stdout and "verified: all weights the same bit by bit" in done.stdout
    done = run("convert", QUANTISED, "-o", tmp_path / "arrays", "--to", "orbax", "--json")
    assert json.loads(done.stdout)["form"] == "orbax"
    texts = [
        run("generate", "the a", "--model", model, "--max-new-tokens", "5", "--dtype", "float32").stdout
        for model in (QUANTISED, tmp_path / "out")
    ]
    assert texts[0] == texts[1] and texts[0]
    done = run("generate", "the", "--model", tmp_path / "none.gguf")
    assert done.exit_code == 1 and "no such file: " in done.stderr and len(done.stderr.splitlines()) == 1
