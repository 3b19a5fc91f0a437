"""`--adapter` of `decodax generate` and `decodax convert`: adapters of the PEFT library, one or several."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import decodax
from decodax.cli.app import app
from decodax.models.checkpoints.write_hf import to_hf
from decodax.verification import verify
from tests.golden_files import load_golden

GOLDEN = Path(__file__).parent / "golden_adapters"
LLAMA = load_golden("llama").folder
ADAPTERS = [GOLDEN / "patterns", GOLDEN / "rank_stabilised"]


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def given(adapters):
    return [text for adapter in adapters for text in ("--adapter", adapter)]


def test_generate_takes_several(monkeypatch):
    calls = []
    monkeypatch.setattr(decodax, "load", lambda *_, adapter, **__: calls.append(adapter) or 1 / 0)
    run("generate", "x", "--model", LLAMA, *given(ADAPTERS))
    run("generate", "x", "--model", LLAMA)
    assert calls == [[str(adapter) for adapter in ADAPTERS], None]


def test_a_converted_model_is_the_merged_one(tmp_path):
    done = run("convert", LLAMA, "-o", tmp_path / "orbax", *given(ADAPTERS), "--verify", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["adapters"] == [str(adapter) for adapter in ADAPTERS] and document["verification"]["is_same"]
    merged = decodax.load(LLAMA, adapter=ADAPTERS).params
    jax.tree.map(np.testing.assert_array_equal, decodax.load(tmp_path / "orbax").params, merged)
    manifest = json.loads((tmp_path / "orbax" / "decodax.json").read_text())
    assert [adapter["name"] for adapter in manifest["source"]["adapters"]] == ["patterns", "rank_stabilised"]


def test_it_is_done_again_for_other_adapters(tmp_path):
    """A conversion that is there is kept only if it is of the same adapters."""
    arguments = ("convert", LLAMA, "-o", tmp_path / "out", "--to", "hf")
    assert run(*arguments, *given(ADAPTERS)).exit_code == 0
    assert "of these bytes were there already" in run(*arguments, *given(ADAPTERS)).stdout
    for other in ([], ADAPTERS[::-1], ADAPTERS[:1]):
        assert "is there already: choose another name" in run(*arguments, *given(other)).output


def test_rounding_by_a_merge_is_no_difference(tmp_path):
    """Sums are rounded to bfloat16 where the weights are; both sides are then compared in it."""
    to_hf(LLAMA, tmp_path / "base", dtype="bfloat16")
    done = run("convert", tmp_path / "base", "-o", tmp_path / "out", "--to", "hf", *given(ADAPTERS), "--verify")
    assert done.exit_code == 0, done.output
    assert "(bfloat16, float32)" in done.stdout  # a tensor that the adapter replaces stays as the adapter has it
    assert "verified: all weights the same bit by bit" in done.stdout and "rounding the weights changed" in done.stdout
    found = verify(tmp_path / "base", tmp_path / "out", adapters=ADAPTERS[:1])
    assert not found.is_same and "head" in found.differing


def test_an_adapter_alone_is_explained(tmp_path):
    done = run("generate", "x", "--model", ADAPTERS[0])
    assert done.exit_code == 1
    assert "holds a LoRA adapter alone" in done.stderr and "--model MODEL --adapter FOLDER" in done.stderr
    folder = Path(shutil.copytree(ADAPTERS[0], tmp_path / "mine"))
    (folder / "adapter_model.safetensors").unlink()
    done = run("convert", LLAMA, "-o", tmp_path / "out", "--adapter", folder)
    assert done.exit_code == 1 and "has neither adapter_model.safetensors nor adapter_model.bin" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["generate", "convert"])
def test_help_names_it(command):
    assert "--adapter" in run(command, "--help").output
