"""`decodax train medusa`, then `medusa_joint` with the model on its own text, and how they fail."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import decodax
from decodax.cli.app import app
from decodax.decoding.auxiliary_weights import read_auxiliary_weights
from tests.test_cli_train import model, text  # noqa: F401  (fixtures)

STEPS = ["--batch=3", "--window=14", "--short-window=14", "--tokens=420", "--optimizer=adamw", "--heldout=0.2"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optax_may_promote")]


def run(kind, *arguments):
    return CliRunner().invoke(app, ["train", kind, *map(str, arguments)])


def test_heads_alone_then_with_the_model(model, text, tmp_path):  # noqa: F811
    usual = ["--model", model, "--text", text, *STEPS]
    alone = run("medusa", *usual, "-o", tmp_path / "heads", "--heads=2", "--blocks=2", "--stride=2", "--json")
    assert alone.exit_code == 0, alone.output
    facts = json.loads(alone.stdout)
    assert facts["about"]["shape"] == {"heads": 2, "blocks": 2, "tied": True} and facts["about"]["stride"] == 2
    assert len(facts["heldout"]["rank_accuracy"]) == 2

    joint = ["--heads", tmp_path / "heads", "--rank=3", "--self-distill=40"]
    together = run("medusa_joint", *usual, "-o", tmp_path / "both", *joint)
    assert together.exit_code == 0, together.output
    assert "the changed model's most probable token is the original's" in together.stdout
    weights = read_auxiliary_weights(tmp_path / "both", "float32")
    assert weights.shape["rank"] == 3 and set(weights.params) == {"heads", "low_rank"}
    assert weights.facts["about"]["text"] != facts["about"]["text"]

    lm = decodax.load(model)
    found = decodax.generate(lm, "def a", max_new_tokens=20, strategy="medusa", draft=tmp_path / "heads")
    np.testing.assert_array_equal(found.tokens, decodax.generate(lm, "def a", max_new_tokens=20).tokens)

    for kind, arguments, code, message in (
        ("medusa", ["--rank=3"], 2, "No such option: --rank"),
        ("medusa", ["--labels=truth"], 1, "labels must be one of ('model', 'text'), got 'truth'"),
        ("medusa_joint", ["--heads", tmp_path / "heads", "--blocks=2"], 2, "No such option: --blocks"),
        ("medusa_joint", [], 2, "Missing option '--heads'"),
        ("medusa_joint", ["--heads", tmp_path / "both"], 1, "start must be Medusa heads that were trained alone"),
        ("medusa_joint", ["--heads", tmp_path / "nowhere"], 1, "holds no auxiliary.json"),
    ):
        failed = run(kind, *usual, "-o", tmp_path / "new", *arguments)
        assert failed.exit_code == code and message in failed.stderr, failed.output
