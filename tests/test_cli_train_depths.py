"""`decodax train skip_decode` and both stages of `decodax train first`: from a text to a part that decodes."""

import json

import pytest
import tokenizers
from typer.testing import CliRunner

from decodax.cli import app
from decodax.decoding.training.export import write_model
from decodax.models.hf_config import read_config
from tests.decoding.training.depths import deep_target
from tests.tiny import TINY_LLAMA

CHARACTERS = "abcdefghijklmnopqrstuvwxyz ():\n"
SHORT = ["--batch=3", "--window=14", "--short-window=14", "--tokens=84", "--heldout=0.2", "--json"]
pytestmark = pytest.mark.usefixtures("optax_may_promote")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Options that name a tiny model of three layers, which reads single characters, and a text."""
    folder = tmp_path_factory.mktemp("model")
    config = TINY_LLAMA | {"num_hidden_layers": 3, "max_position_embeddings": 64, "eos_token_id": 5}
    assert read_config(config)[1].num_layers == deep_target().config.num_layers
    write_model(folder, config, deep_target().params, "float32")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.save(str(folder / "tokenizer.json"))
    text = folder / "text.py"
    text.write_text("".join(f"def x{letter}(b):\n  return b\n" for letter in CHARACTERS[:26]))
    return ["--model", folder, "--text", text]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def trained(kind, given, out, *options):
    result = run("train", kind, *given, "-o", out, *SHORT, *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def decodes(kind, given, out):
    result = run("generate", "def xa", *given[:2], "--strategy", kind, "--draft", out, "--max-new-tokens=3")
    assert result.exit_code == 0, result.output


def test_skip_decode(given, tmp_path):
    facts = trained("skip_decode", given, tmp_path / "out", "--min-layers=2", "--rank=2")
    shape = {"min_layers": 2, "max_layers": None, "warmup": 1, "rank": 2}
    assert facts["about"]["shape"] == shape and facts["trained_tokens"] == 84
    decodes("skip_decode", given, tmp_path / "out")


def test_first_in_two_stages(given, tmp_path):
    facts = trained("first", given, tmp_path / "routers", "--regulariser=9", "--decisiveness=0.5")
    assert (facts["about"]["shape"]["regulariser"], facts["about"]["shape"]["decisiveness"]) == (9, 0.5)
    facts = trained("first", given, tmp_path / "out", "--routers", tmp_path / "routers", "--rank=2")
    assert facts["about"]["shape"]["rank"] == 2 and facts["about"]["shape"]["regulariser"] == 9
    decodes("first", given, tmp_path / "out")
    for options, message in (
        (["--rank=2"], "--rank belongs to the second stage"),
        (["--routers", tmp_path / "routers", "--regulariser=1"], "belong to the first stage"),
        (["--routers", tmp_path / "nowhere"], "holds no part.json"),
    ):
        result = run("train", "first", *given, "-o", tmp_path / "new", *SHORT, *options)
        assert result.exit_code == 1 and message in result.stderr, (message, result.output)
