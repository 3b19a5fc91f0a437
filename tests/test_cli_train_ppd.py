"""`decodax train ppd`, then `decodax generate` with its weights: the model's own text, and no other model's."""

import json
import shutil

import jax
import pytest
from typer.testing import CliRunner

from decodax.cli.app import app
from decodax.decoding.training.export import write_model
from decodax.models.configs.hf_config import read_config
from decodax.models.model import Model
from tests.test_cli_train import CONFIG, model, text  # noqa: F401  (fixtures)

STEPS = ["--batch=3", "--window=14", "--short-window=14", "--tokens=1260", "--heldout=0.5"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optax_may_promote")]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_trained_prompt_tokens_give_the_model_s_own_text(model, text, tmp_path):  # noqa: F811
    out = tmp_path / "prompts"
    result = run("train", "ppd", "--model", model, "--text", text, "-o", out, "--distances=2", *STEPS, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["about"]["shape"] == {"distances": 2, "ensemble": 1} and len(facts["heldout"]["rank_accuracy"]) == 2
    assert (facts["trained_tokens"], facts["plan"]["peak"], facts["plan"]["optimizer"]) == (1260, 0.05, "adamw")

    prompts = ["def xa(b):", "return"]
    options = ["--dtype=float32", "--max-new-tokens=30", "--stop-token-ids=", "--no-compilation-cache", "--json"]
    plain, drafted = (
        run("generate", *prompts, "--model", model, *options, *strategy)
        for strategy in ([], ["--strategy", "ppd", "--draft", out])
    )
    assert plain.exit_code == 0 and drafted.exit_code == 0, plain.output + drafted.output
    expected, found = json.loads(plain.stdout), json.loads(drafted.stdout)
    assert (found["tokens"], found["text"]) == (expected["tokens"], expected["text"])
    assert [len(tokens) for tokens in found["tokens"]] == [30, 30]
    assert found["stats"]["strategy"] == "ppd" and sum(found["stats"]["accepted_lengths"][1:]) > 0

    wider = CONFIG | {"hidden_size": 26}
    write_model(tmp_path / "wider", wider, Model(read_config(wider)[1]).init(jax.random.key(1)), "float32")
    shutil.copy(model / "tokenizer.json", tmp_path / "wider")
    refused = run("generate", *prompts, "--model", tmp_path / "wider", *options, "--strategy", "ppd", "--draft", out)
    assert refused.exit_code == 1 and refused.stdout == ""
    assert refused.stderr == (
        "error: prompts was made for a model whose hidden size is 22, and that of wider is 26: train weights for "
        "this model with `decodax train ppd`\n"
    )
