"""`decodax convert` in both directions: what it reports, and how it fails."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import typer
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import decodax
from decodax.cli.app import app
from decodax.cli.convert import read_size
from decodax.models import load as load_module
from decodax.models.checkpoints.write_orbax import from_hf
from decodax.verification import verify
from tests.golden_files import load_golden

LLAMA = load_golden("llama").folder


def convert(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_there_and_back(tmp_path):
    done = convert(LLAMA, "-o", tmp_path / "orbax", "--verify")
    assert done.exit_code == 0, done.output
    num_bytes = decodax.load(LLAMA).nbytes
    assert f"orbax: Orbax checkpoint, {num_bytes // 4:,} parameters, {num_bytes:,} bytes (float32)" in done.stdout
    assert "verified: all weights the same bit by bit, largest difference of logits 0" in done.stdout
    again = convert(LLAMA, "-o", tmp_path / "orbax")
    assert f"{num_bytes:,} of these bytes were there already" in again.stdout
    done = convert(tmp_path / "orbax", "-o", tmp_path / "hf", "--max-shard-size", "20KB", "--json")
    document = json.loads(done.stdout)
    assert document["form"] == "hf" and document["resumed_bytes"] == 0 and document["verification"] is None
    assert document["num_bytes"] == num_bytes and document["dtypes"] == ["float32"]
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    jax.tree.map(np.testing.assert_array_equal, decodax.load(tmp_path / "hf").params, decodax.load(LLAMA).params)


def test_rounded_weights_are_compared_after_rounding(tmp_path):
    document = json.loads(
        convert(LLAMA, "-o", tmp_path / "hf", "--to", "hf", "--dtype", "bfloat16", "--verify", "--json").stdout
    )
    found = document["verification"]
    assert found["is_same"] and found["differing"] == [] and found["largest_logit_difference"] == 0
    one, two = decodax.load(LLAMA), decodax.load(tmp_path / "hf", dtype="float32")
    tokens = np.random.default_rng(0).integers(0, 67, (2, 32))
    expected = np.abs(decodax.logits(one, tokens) - decodax.logits(two, tokens)).max()
    assert found["rounding_logit_difference"] == pytest.approx(float(expected)) and expected > 0
    text = convert(LLAMA, "-o", tmp_path / "hf", "--to", "hf", "--dtype", "bfloat16", "--verify").stdout
    assert "rounding the weights changed logits by up to" in text


def test_a_planted_wrong_weight_is_found(tmp_path):
    """One bit of one number: in a matrix, which changes logits, and in the row of a token that no text holds."""
    for name, moves in (("blocks_1.feed_forward.down", True), ("embedding", False)):
        target = tmp_path / name
        from_hf(LLAMA, target)
        (file,) = (target / "params" / name).glob("0.*")
        content = bytearray(file.read_bytes())
        content[-2] ^= 0x80  # the top bit of the mantissa of the last number
        file.write_bytes(content)
        done = convert(LLAMA, "-o", target, "--verify")
        assert done.exit_code == 1 and "verified" not in done.stdout
        assert (
            f"error: {target} is not the model that it was made from: 1 weight(s) differ ({name.replace('.', '/')})"
            in done.stderr
        )
        found = verify(LLAMA, target)
        assert found.differing == (name.replace(".", "/"),)
        assert (found.largest_logit_difference > 0) == (
            moves or 66 in np.random.default_rng(0).integers(0, 67, (2, 32))
        )


def test_tensors_missing_on_one_side_are_found(tmp_path):
    mtp = Path(__file__).parent / "golden" / "deepseek_v3_mtp"
    source = Path(shutil.copytree(mtp, tmp_path / "source"))
    from_hf(source, tmp_path / "orbax")
    tensors = load_file(source / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.startswith("model.layers.2.")}, source / "model.safetensors")
    found = verify(source, tmp_path / "orbax")
    assert all(name.startswith("mtp_head/") for name in found.differing) and len(found.differing) > 10
    assert not found.is_same and found.largest_logit_difference == 0


def test_arrays_sharded_for_a_mesh(tmp_path):
    """Six experts over the two devices of each of four groups: each device's three are in their own file."""
    source = Path(__file__).parent / "golden" / "deepseek_v3_mtp"
    done = convert(source, "-o", tmp_path / "orbax", "--mesh", "expert=2,data=4", "--verify")
    assert done.exit_code == 0, done.output
    files = list((tmp_path / "orbax" / "params" / "mtp_head.block.feed_forward.experts.gate").glob("[0-9]*"))
    assert {file.name: file.stat().st_size for file in files} == {f"{i}.0.0": 4 * 3 * 11 * 30 for i in range(2)}
    on_mesh = decodax.load(tmp_path / "orbax", mesh="expert=2,data=4")
    jax.tree.map(np.testing.assert_array_equal, on_mesh.params, decodax.load(source).params)
    done = convert(source, "-o", tmp_path / "other", "--mesh", "expert=16")
    assert done.exit_code == 1 and "the mesh 'expert=16' needs 16 devices" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/no/where"], "no such model folder: /no/where"),
        ([LLAMA, "--dtype", "int8"], "dtype must be one of float32, bfloat16, float16 or None, got 'int8'"),
        ([LLAMA.parent], "has no config.json"),
    ],
)
def test_inputs_that_cannot_be_converted(tmp_path, arguments, expected):
    done = convert(*arguments, "-o", tmp_path / "out")
    assert done.exit_code == 1 and expected in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_no_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for options in ((), ("--overwrite",)):
        done = convert(LLAMA, "-o", tmp_path / "out", *options)
        assert done.exit_code == 1 and done.stderr.count("\n") == 1
        assert "is there already and is neither a folder that convert wrote nor an Orbax checkpoint" in done.stderr
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "mine"]
    assert convert(LLAMA, "-o", tmp_path / "orbax").exit_code == 0
    done = convert(LLAMA, "-o", tmp_path / "orbax", "--dtype", "bfloat16")
    assert done.exit_code == 1 and "pass overwrite=True (--overwrite on the command line) to replace it" in done.stderr
    assert convert(LLAMA, "-o", tmp_path / "orbax", "--dtype", "bfloat16", "--overwrite").exit_code == 0
    monkeypatch.setattr("decodax.cli.convert.find_folder", lambda source: pytest.fail("it was looked for"))
    done = convert("org/name", "-o", LLAMA / "config.json" / "x")
    assert done.exit_code == 1 and "config.json is no folder" in done.stderr


def test_options_of_the_other_form_are_refused(tmp_path):
    for options in (
        ("--to", "orbax", "--max-shard-size", "1GB"),
        ("--to", "hf", "--mesh", "tensor=8"),
        ("--to", "gguf"),
    ):
        assert convert(LLAMA, "-o", tmp_path / "out", *options).exit_code == 2
    assert not (tmp_path / "out").exists()


def test_sizes():
    for text, expected in {"7": 7, "5GB": 5 * 10**9, "2GiB": 2**31, "500 mb": 5 * 10**8, "3kib": 3072}.items():
        assert read_size(text) == expected
    for text in ("", "GB", "0", "1.5GB", "-1", "5TB", "GB5", "5GBB"):
        with pytest.raises(typer.BadParameter, match=r"a size is a whole number of bytes, or like 500MB"):
            read_size(text)


def test_the_bar_shows_bytes_and_the_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(load_module, "_SILENT_SECONDS", -1.0)
    assert "converting" not in convert(LLAMA, "-o", tmp_path / "quiet").stderr
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    shown = convert(LLAMA, "-o", tmp_path / "out").stderr
    assert "converting llama" in shown and "kB" in shown and "0:00:00" in shown
