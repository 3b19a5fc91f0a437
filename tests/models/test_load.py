"""Loading a model by name: folders, the embedded model, the hub without a network, dtypes, a quiet progress bar."""

import shutil
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file

from decodax.models import load as load_module
from decodax.models.checkpoints.reading import NonFiniteWeightWarning
from decodax.models.checkpoints.write_hf import to_hf
from decodax.models.load import find_folder, load
from tests.golden_files import load_golden

LLAMA = load_golden("llama").folder


@pytest.fixture
def folder(tmp_path):
    """A model folder that a test may damage."""
    return Path(shutil.copytree(LLAMA, tmp_path / "model"))


def kinds(lm):
    return {leaf.dtype.name for leaf in jax.tree.leaves(lm.params)}


def test_a_folder():
    lm = load(LLAMA)
    assert lm.path == LLAMA and lm.tokenizer is None and lm.end_token_ids == ()
    assert lm.config == lm.model.config and lm.config.num_layers == 2
    assert lm.nbytes == 4 * sum(value.size for value in load_file(LLAMA / "model.safetensors").values())
    assert load(str(LLAMA)).path == LLAMA
    assert len(repr(lm)) < 300 and lm == lm and hash(lm)  # weights are not printed, nor compared


def test_the_embedded_model_is_the_default():
    lm = load()
    assert lm.path.name == "demo" and lm.path.parent.name == "models"
    text = "def naïve(n):\n    return n"
    assert lm.tokenizer.decode(lm.tokenizer.encode(text)) == text
    assert lm.tokenizer.vocab_size <= lm.config.vocab_size and lm.end_token_ids


def test_dtype():
    assert kinds(load(LLAMA)) == {"float32"}  # on CPU
    for dtype in ("bfloat16", jnp.bfloat16, np.dtype(jnp.bfloat16)):
        assert kinds(load(LLAMA, dtype=dtype)) == {"bfloat16"}
    assert load(LLAMA, dtype="float16").nbytes * 2 == load(LLAMA).nbytes
    for dtype in ("int8", "float33", "fp32", jnp.int32):
        with pytest.raises(ValueError, match=r"dtype must be one of float32, bfloat16, float16 or None, got"):
            load(LLAMA, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("deepseek_v3", {"selection_bias": "mlp.gate.e_score_correction_bias"}),
        ("qwen3_next", {"decay_rate": "linear_attn.A_log", "decay_bias": "linear_attn.dt_bias"}),
    ],
)
@pytest.mark.quick_cases(1)
def test_a_weight_with_a_dtype_of_its_own_keeps_it(name, kept, tmp_path):
    """Loaded, made and converted; rounded, a bias of the router would choose other experts."""
    folder = load_golden(name).folder
    tensors = load_file(folder / "model.safetensors")
    for stored in (part for part in tensors if part.endswith(tuple(kept.values()))):
        tensors[stored] = tensors[stored].astype(np.float32) + np.float32(1e-5)  # which bfloat16 cannot hold
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    converted = tmp_path.with_name(f"{tmp_path.name}_converted")
    to_hf(tmp_path, converted, dtype="bfloat16")
    lm = load(tmp_path, dtype="bfloat16")
    again = load(converted, dtype="bfloat16")
    for params in (lm.params, again.params, lm.model.init(jax.random.key(0), "bfloat16")):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            assert leaf.dtype == ("float32" if path[-1].key in kept else "bfloat16")
    assert kinds(lm) == {"bfloat16", "float32"} and lm.dtype == jnp.bfloat16
    stored = [value for part, value in tensors.items() if part.endswith(tuple(kept.values()))]
    for params in (lm.params, again.params):
        found = [np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key in kept]
        assert sorted(np.concatenate(found).tolist()) == sorted(np.concatenate(stored).tolist())


@pytest.mark.parametrize(
    "name",
    ["./nowhere", "nowhere", "/no/where", "~/no/where", "a/b/c", "", "bad id/na me", "org/", "~nobody-of-that-name/x"],
)
def test_no_such_folder(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=name.removeprefix("./").removeprefix("~/") or "empty"):
        load(name)


def test_names_that_are_no_valid_paths():
    for name in ("x" * 5000, "org/" + "x" * 5000, "a\0b"):
        with pytest.raises(FileNotFoundError):
            load(name)


def test_a_file_in_place_of_a_folder_is_refused():
    with pytest.raises(FileNotFoundError, match=r"config.json is a file, and no GGUF file: pass the model's folder"):
        load(LLAMA / "config.json")


def test_a_folder_without_config_or_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        load(folder)


def test_damaged_weights(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, file)
    with pytest.warns(NonFiniteWeightWarning, match=r"model.norm.weight"):
        load(folder)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"no intact safetensors file"):
        load(folder)


def test_only_files_that_are_read_are_downloaded(monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(LLAMA)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_folder("org/name") == LLAMA
    assert asked.pop("name") == "org/name"
    needed = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    needed += ["tokenizer.model"]
    others = [
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/x.safetensors",
        "onnx/config.json",
        "README.md",
    ]
    assert list(filter_repo_objects(needed + others, **asked)) == needed


def test_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConnectionError, match=r"org/name is not an existing folder .*offline.* pass the path of a local"
    ):
        load("org/name")


def test_progress_appears_only_when_it_takes_long(monkeypatch, capsys):
    load(LLAMA)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(load_module, "_SILENT_SECONDS", -1.0)
    load(LLAMA)
    assert capsys.readouterr() == ("", "")  # no terminal, no bar
    monkeypatch.setenv("FORCE_COLOR", "1")  # tells rich that this is a terminal
    load(LLAMA)
    out, err = capsys.readouterr()
    assert out == "" and "loading llama" in err
