"""Weights are read with every tensor in its place and little memory; damage is reported before any computation."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from decodax.models.checkpoints import reading
from decodax.models.checkpoints.name_map import single_tensor
from decodax.models.checkpoints.name_map_selection import REDUNDANT_SUFFIXES
from decodax.models.checkpoints.reading import NonFiniteWeightWarning, load_params
from decodax.models.checkpoints.safetensors_files import weight_files
from decodax.models.configs.hf_config import load_config
from tests.golden_files import golden_cases, load_golden

TIED = "llama_tied"
STATUS = Path("/proc/self/status")


def copy_of(name, folder):
    """The config of a golden case in a new folder, and its tensors, to be changed and saved."""
    source = load_golden(name).folder
    shutil.copy(source / "config.json", folder)
    return load_file(source / "model.safetensors")


def params_of(folder, dtype=np.float32, **options):
    family, config = load_config(folder)
    return load_params(folder, family, config, dtype=np.dtype(dtype), **options)


def saved(tensors, folder, **options):
    save_file(tensors, folder / "model.safetensors")
    return params_of(folder, **options)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", golden_cases())
def test_every_tensor_has_its_place_and_shape(name):
    folder = load_golden(name).folder
    family, config = load_config(folder)
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        stored, params = set(file.keys()), params_of(folder)
    name_maps = family.name_maps(config)
    assert jax.tree.map(lambda weight: weight.shape, config.weights()) == jax.tree.map(lambda leaf: leaf.shape, params)
    beside = ("_scale_inv", "_scales", *REDUNDANT_SUFFIXES)  # they belong to a tensor, or are no weights
    names = {tensor for tensor in stored if not tensor.endswith(beside)}
    assert names <= {
        tensor_slice.name for several in name_maps.values() for name_map in several for tensor_slice in name_map
    }
    for path, several in name_maps.items():
        leaf = params
        for key in path:
            leaf = leaf[key]
        name = several[0][0].name
        if several == single_tensor(name) and f"{name}_scale_inv" not in stored:
            with safe_open(folder / "model.safetensors", framework="numpy") as file:
                np.testing.assert_array_equal(leaf, file.get_tensor(name))


def test_mtp_heads_are_no_surplus(tmp_path):
    """Qwen3-Next's published files hold them; anything else that is not the model's is refused."""
    folder = load_golden("qwen3_next").folder
    shutil.copy(folder / "config.json", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "mtp.fc.weight": np.ones((2, 3), np.float32)}, tmp_path / "model.safetensors")
    assert_same(params_of(tmp_path), params_of(folder))
    save_file({**tensors, "model.mtpx.weight": np.ones((2, 3), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"surplus: model.mtpx.weight"):
        params_of(tmp_path)


def test_names_of_the_norms_of_gemma2():
    family, config = load_config(load_golden("gemma2").folder)
    names = family.tensor_names(config)
    assert {name.split(".")[3]: path[1] for name, path in names.items() if name.startswith("model.layers.1.")} == {
        "input_layernorm": "mixer_norm",
        "self_attn": "mixer",
        "post_attention_layernorm": "mixer_post_norm",
        "pre_feedforward_layernorm": "feed_forward_norm",
        "mlp": "feed_forward",
        "post_feedforward_layernorm": "feed_forward_post_norm",
    }


def test_shards_are_one_file(tmp_path):
    tensors = copy_of("llama", tmp_path)
    names = sorted(tensors)
    files = {"a.safetensors": names[:5], "b.safetensors": names[5:6], "c.safetensors": names[6:]}
    for file, content in files.items():
        save_file({name: tensors[name] for name in content}, tmp_path / file)
    weight_map = {name: file for file, content in files.items() for name in content}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(params_of(tmp_path), params_of(load_golden("llama").folder))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index.json names files that are not in .*: b.safetensors"):
        params_of(tmp_path)
    for content in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(content)
        with pytest.raises(ValueError, match=r"index.json (is no valid JSON|must hold a JSON|must be JSON with)"):
            params_of(tmp_path)


@pytest.mark.parametrize("kept", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("stored", [np.float64, np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("piece_bytes", [1, 1000, 2**22])
def test_cast_on_the_way_in_pieces(tmp_path, monkeypatch, stored, kept, piece_bytes):
    monkeypatch.setattr(reading, "PIECE_BYTES", piece_bytes)
    tensors = {name: value.astype(stored) for name, value in copy_of("llama", tmp_path).items()}
    params = saved(tensors, tmp_path, dtype=kept)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(kept)}
    expected = tensors["model.layers.1.mlp.down_proj.weight"].astype(kept)
    np.testing.assert_array_equal(params["blocks_1"]["feed_forward"]["down"], expected)
    np.testing.assert_array_equal(params["head"], tensors["lm_head.weight"].astype(kept))


def test_the_file_may_change_afterwards(tmp_path):
    tensors = copy_of("llama", tmp_path)
    params = saved(tensors, tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\0" * size)
    assert_same(params, params_of(load_golden("llama").folder))


MEMORY_SCRIPT = """
    import sys, threading, time
    from pathlib import Path
    import jax, numpy as np
    from decodax.models.checkpoints import reading
    from decodax.models.checkpoints.reading import load_params
    from decodax.models.configs.hf_config import load_config

    def anonymous_bytes():
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024

    folder, dtype, keep = Path(sys.argv[1]), np.dtype(sys.argv[2]), sys.argv[3] == "keep"
    family, config = load_config(folder)
    jax.block_until_ready(jax.device_put(np.ones(8)))
    small = jax.device_put(np.ones(8))
    if not keep:
        reading.to_device = lambda host, device: small
    peak, done, before = 0, False, anonymous_bytes()

    def watch():
        global peak
        while not done:
            peak = max(peak, anonymous_bytes())
            time.sleep(2e-4)

    watcher = threading.Thread(target=watch)
    watcher.start()
    params = load_params(folder, family, config, dtype=np.dtype(dtype))
    done = True
    watcher.join()
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) if keep else 0
    print(peak - before - kept)
"""


@pytest.mark.skipif(not STATUS.is_file() or "RssAnon" not in STATUS.read_text(), reason="needs Linux's accounting")
@pytest.mark.parametrize("keep", ["keep", "drop"])
@pytest.mark.parametrize(("stored", "kept"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.quick_cases(2)
def test_peak_host_memory(tmp_path, stored, kept, keep):
    """At most 1.3 largest tensors beyond the file mapping and the parameters themselves, which on CPU are host memory.

    "drop" simulates an accelerator: arrays put there keep no host memory.
    """
    hidden, vocabulary = 256, 60_000
    config = json.loads((load_golden(TIED).folder / "config.json").read_text())
    config |= {"vocab_size": vocabulary, "hidden_size": hidden, "num_attention_heads": 4, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    family, described = load_config(tmp_path)
    shapes = {path: weight.shape for path, weight in reading.flat_weights(described.weights()).items()}
    tensors = {
        name: np.ones(shapes[path], ml_dtypes.bfloat16 if stored == "bfloat16" else stored)
        for name, path in family.tensor_names(described).items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    largest = vocabulary * hidden * np.dtype(kept if kept == "float32" else ml_dtypes.bfloat16).itemsize
    script = textwrap.dedent(MEMORY_SCRIPT)
    command = [sys.executable, "-c", script, str(tmp_path), kept, keep]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    extra = int(run.stdout)
    assert extra <= 1.3 * largest, (extra, largest)
    assert keep == "keep" or extra > 0.5 * largest, "the watcher saw nothing"


@pytest.mark.parametrize("missing_bytes", [1, 5000])
def test_truncated_file_names_expected_and_actual_bytes(tmp_path, missing_bytes):
    tensors = copy_of("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    content = file.read_bytes()
    file.write_bytes(content[:-missing_bytes])
    expected = f"expected {len(content)} bytes, it has {len(content) - missing_bytes}"
    with pytest.raises(ValueError, match=rf"model.safetensors is no intact safetensors file \({expected}"):
        params_of(tmp_path)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 8, (4).to_bytes(8, "little") + b"{no}" + b"1234"])
def test_damaged_header(tmp_path, content):
    copy_of("llama", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"no intact safetensors file .*it has {len(content)} bytes"):
        params_of(tmp_path)


def test_missing_surplus_and_misshapen_are_listed_together(tmp_path):
    tensors = copy_of("llama", tmp_path)
    del tensors["lm_head.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.ones((3, 2), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(3, np.float32)
    tensors["model.norm.weight"] = np.ones(31, np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.ones((41, 30), np.int8)
    with pytest.raises(ValueError) as caught:
        saved(tensors, tmp_path)
    for line in (
        "missing: lm_head.weight [67, 30]",
        "missing: model.layers.0.mlp.up_proj.weight [41, 30]",
        "surplus: model.layers.2.mlp.up_proj.weight [3, 2]",
        "surplus: model.layers.0.self_attn.q_proj.bias [3]",
        "misshapen: model.norm.weight [31], expected [30]",
        "unknown kind of number: model.layers.1.mlp.up_proj.weight is I8",
    ):
        assert f"  - {line}" in str(caught.value)


def test_redundant_tensors_pass(tmp_path):
    tensors = copy_of(TIED, tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    tensors["model.layers.0.self_attn.k_scale"] = np.ones(1, np.float32)
    assert_same(saved(tensors, tmp_path), params_of(load_golden(TIED).folder))
    del tensors["model.embed_tokens.weight"]  # the one matrix under its other name
    assert_same(saved(tensors, tmp_path), params_of(load_golden(TIED).folder))


def test_a_tied_head_that_differs_is_refused(tmp_path):
    tensors = copy_of(TIED, tmp_path)
    embedding = tensors["model.embed_tokens.weight"]
    for head in (embedding + np.float32(1), embedding[:-1].copy(), embedding.reshape(embedding.shape[::-1])):
        tensors["lm_head.weight"] = head
        with pytest.raises(ValueError, match=r"lm_head.weight differs from the embedding although the config ties"):
            saved(tensors, tmp_path)


def test_base_model_names_without_prefix(tmp_path):
    tensors = {name.removeprefix("model."): value for name, value in copy_of(TIED, tmp_path).items()}
    assert_same(saved(tensors, tmp_path), params_of(load_golden(TIED).folder))
    tensors = {name.removeprefix("model."): value for name, value in copy_of("llama", tmp_path).items()}
    del tensors["lm_head.weight"]
    with pytest.raises(ValueError, match=r"missing: lm_head.weight \[67, 30\]"):
        saved(tensors, tmp_path)


@pytest.mark.parametrize(
    ("value", "stored", "kept"),
    [
        (np.nan, np.float32, np.float32),
        (-np.inf, np.float32, ml_dtypes.bfloat16),
        (np.nan, ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        (np.inf, np.float16, np.float16),
        (1e30, np.float32, np.float16),
    ],
)
def test_nonfinite_weights_are_named(tmp_path, monkeypatch, value, stored, kept):
    monkeypatch.setattr(reading, "PIECE_BYTES", 1000)  # the bad value is neither in the first piece nor in the last
    tensors = {name: tensor.astype(stored) for name, tensor in copy_of("llama", tmp_path).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][20, 29] = value
    with pytest.warns(NonFiniteWeightWarning, match=r"in 1 weight\(s\) of .*: model.layers.1.mlp.up_proj.weight$"):
        params = saved(tensors, tmp_path, dtype=kept)
    assert not np.isfinite(np.float32(params["blocks_1"]["feed_forward"]["up"][20, 29]))


def test_a_sharding_is_requested_for_every_weight_and_progress_ends_at_the_total():
    seen, reports, device = {}, [], jax.devices()[3]

    def sharding_of(weight, path):
        seen[path] = weight
        return SingleDeviceSharding(device)

    folder = load_golden("qwen3_window").folder
    params = params_of(folder, sharding_of=sharding_of, progress=lambda done, total: reports.append((done, total)))
    assert seen == reading.flat_weights(load_config(folder)[1].weights())
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(params))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert reports[-1] == (total, total) and len(reports) == len(seen)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], "has neither model.safetensors nor model.safetensors.index.json: the weights are expected"),
        (["other.bin", "x.pt"], "only other.bin, x.pt: pickled weights are read from pytorch_model.bin, or"),
        (["other.safetensors"], "only other.safetensors: rename"),
        (["decodax.json"], "nor params/_METADATA, which an Orbax checkpoint has"),
    ],
)
def test_no_readable_weights(tmp_path, files, expected):
    for file in files:
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=expected):
        weight_files(tmp_path)
