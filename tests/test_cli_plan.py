"""`decodax plan` prints tables, JSON and a picture, and explains what cannot be planned."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import decodax
from decodax.cli.app import app
from tests.golden_files import load_golden
from tests.planning.published import FIELDS

RUNNER = CliRunner()


@pytest.fixture
def llama(tmp_path):
    """A folder with the config.json of Llama-3.1-8B, and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(FIELDS["Llama-3.1-8B"]))
    return tmp_path


def run(*arguments):
    return RUNNER.invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "200"})


def test_tables_and_a_picture(llama, tmp_path):
    picture = tmp_path / "plan.png"
    done = run("--model", llama, "--topology", "v5e:2x4", "--compile", 0, "--picture", picture)
    assert done.exit_code == 0, done.output
    for words in ("tensor=8", "reading weights", "68 x all-reduce over tensor", "by the model only", "room for"):
        assert words in done.output
    assert 'decodax.load(..., mesh="tensor=8")' in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_json_into_a_file_and_from_the_cost_model_alone(llama):
    options = ("--topology", "gpu:h200x8", "--weights", "int8", "--objective", "throughput", "--batch", 16, "--json")
    done = run("--model", llama / "config.json", *options)
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["topology"] == "gpu:h200x8" and found["num_chips"] == 8 and not found["programs"]
    assert found["by_model_only"].startswith("NVIDIA H200 SXM")
    best, *others = found["plans"]
    assert best["mesh"] == found["mesh"]
    assert best["tokens_per_second"] >= max(one["tokens_per_second"] for one in others)
    for plan in found["plans"]:
        memory = plan["bytes_per_chip"]
        assert memory["total"] == memory["weights"] + memory["cache"] + memory["temporaries"]
        assert sum(plan["token"]["seconds"].values()) == pytest.approx(plan["seconds_per_token"])
    assert found["room"]["most_rows"] > 16 and found["workload"]["weights"] == "int8"


@pytest.mark.slow
def test_the_mesh_it_prints_is_one_that_loads():
    """A tiny model for eight chips, on eight CPU devices."""
    folder = load_golden("llama").folder
    done = run("--model", folder, "--topology", "v5e:2x4", "--compile", 0, "--json")
    assert done.exit_code == 0, done.output
    mesh = json.loads(done.output)["mesh"]
    split, whole = (decodax.load(folder, dtype="float32", mesh=name) for name in (mesh, None))
    assert split.model.execution.mesh is not None and split.model.execution.mesh.size == len(jax.devices())
    prompts = [[5, 6, 7, 8]] * 8
    got, expected = (decodax.generate(lm, prompts, max_new_tokens=3, stop_token_ids=[]).tokens for lm in (split, whole))
    np.testing.assert_array_equal(got, expected)


def test_reports_left_out_meshes_and_counted_bytes(tmp_path):
    fields = FIELDS["Llama-3.1-8B"] | {
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "head_dim": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": 1500}))
    options = ("--model", tmp_path, "--topology", "v5e:2x4", "--compile", 0)
    done = run(*options)
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    assert "8 rows of 1500 tokens" in words and "or 8 rows of 1,500 (the model's context)" in words
    assert "left out: blocks_0/mixer/query: its axis N of 9 query heads does not divide over the 8 devices" in words
    assert "(tensor=2,context=4; tensor=2,context=2,pipeline=2;" in words and "and 1 more)" in words
    assert "GFLOP: of matrix products and attention. GB moved: each weight" in words
    found = json.loads(run(*options, "--json").output)
    assert len(found["plans"]) == 7 and {"mesh", "reason"} == set(found["left_out"][0])
    assert set(found["counted"]) == {"by_the_model", "by_the_compiler"}


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--topology", "v5e:5x5"), 1, "know no topology 'v5e:5x5'; there are"),
        (("--topology", "v5e:2x4", "--batch", 3, "--mesh", "data=8"), 1, "a batch of 3 does not divide over data=8"),
        (("--topology", "v5e:2x4", "--context", 131073), 1, "context must be at most the model's 131,072 tokens"),
        (("--topology", "v5e:2x4", "--mesh", "tensor=4"), 1, "the mesh 'tensor=4' needs 4 chips, and v5e:2x4 has 8"),
        (("--topology", "v5e:2x4", "--model", "nowhere"), 1, "nowhere is neither a model folder nor a config.json"),
        (("--topology", "v5e:1x1", "--batch", 64, "--context", 100000), 1, "too few"),
        (("--topology", "v5e:2x4", "--objective", "speed"), 2, "objective must be one of time-per-token"),
        (("--topology", "v5e:2x4", "--weights", "int4"), 2, "weights must be one of same, int8"),
    ],
)
def test_bad_input(options, code, said, llama):
    model = () if "--model" in options else ("--model", llama)
    done = run(*options, *model)
    assert done.exit_code == code
    assert said in " ".join(done.output.replace("│", " ").split())


@pytest.mark.slow
def test_plans_compiled_for_absent_pods(llama):
    """As a user calls it, in a separate process without the session's matmul precision."""
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu (Linux on x86-64)")
    command = [sys.executable, "-m", "decodax", "plan", "--model", llama, "--topology", "v5e:2x4", "--json"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    step, prompt = found["programs"][0]
    memory = found["plans"][0]["bytes_per_chip"]
    assert found["by_model_only"] is None and step["what"] == "decoding step"
    assert step["argument_bytes"] == pytest.approx(memory["weights"] + memory["cache"], rel=0.02)
    assert (prompt["num_layers"], prompt["of_layers"]) == (2, 32)
    assert sum(one["count"] for one in step["collectives"]) == 68
