"""`decodax train` for skip_decode, specee, first_gates and first: from a text to weights that decode."""

import json

import jax
import pytest
import tokenizers
from typer.testing import CliRunner

from decodax.cli.app import app
from decodax.decoding.training.export import write_model
from decodax.models.configs.hf_config import read_config
from decodax.models.model import Model
from tests.decoding.training.deep_target import deep_target
from tests.tiny import TINY_LLAMA

CHARACTERS = "abcdefghijklmnopqrstuvwxyz ():\n"
SHORT = ["--batch=3", "--window=14", "--short-window=14", "--tokens=84", "--heldout=0.2", "--json"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optax_may_promote")]


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
    text.write_text("".join(f"def x{character}(b):\n  return b\n" for character in CHARACTERS[:26]))
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


@pytest.fixture
def draft(tmp_path):
    """The folder of a draft of one layer, which has the model's vocabulary."""
    write_model(tmp_path / "draft", TINY_LLAMA, Model(read_config(TINY_LLAMA)[1]).init(jax.random.key(7)), "float32")
    return tmp_path / "draft"


def test_specee(given, draft, tmp_path):
    out, sizes = tmp_path / "out", ["--hidden-size=5", "--likely-tokens=3", "--positions=7"]
    facts = trained("specee", given, out, "--draft", draft, *sizes)
    assert facts["about"]["shape"] == {"hidden_size": 5, "likely_tokens": 3, "positions": 7}
    assert (facts["trained_tokens"], facts["target_layers"], facts["plan"]["optimizer"]) == (84, 3, "adamw")
    for name in ("config.json", "model.safetensors"):
        assert (out / "draft" / name).read_bytes() == (draft / name).read_bytes()
    decodes("specee", given, out)
    for options, message in (
        ([], "needs a draft for"),
        (["--draft", draft, "--positions=7", "--hidden-size=6"], "already holds another model"),
    ):
        result = run("train", "specee", *given, "-o", out, *SHORT, *options)
        assert result.exit_code == 1 and message in result.stderr, (message, result.output)


def test_first_in_two_stages(given, tmp_path):
    facts = trained("first_gates", given, tmp_path / "layer_gates", "--regulariser=9", "--decisiveness=0.5")
    assert (facts["about"]["shape"]["regulariser"], facts["about"]["shape"]["decisiveness"]) == (9, 0.5)
    assert facts["plan"]["peak"] == 0.02
    decodes("first", given, tmp_path / "layer_gates")
    facts = trained("first", given, tmp_path / "out", "--layer-gates", tmp_path / "layer_gates", "--rank=2")
    assert facts["about"]["shape"]["rank"] == 2 and facts["about"]["shape"]["regulariser"] == 9
    assert facts["plan"]["peak"] == 0.002
    decodes("first", given, tmp_path / "out")
    for kind, options, code, message in (
        ("first_gates", ["--rank=2"], 2, "No such option: --rank"),
        ("first", ["--layer-gates", tmp_path / "layer_gates", "--regulariser=1"], 2, "No such option: --regulariser"),
        ("first", [], 2, "Missing option '--layer-gates'"),
        ("first", ["--layer-gates", tmp_path / "nowhere"], 1, "holds no auxiliary.json"),
    ):
        result = run("train", kind, *given, "-o", tmp_path / "new", *SHORT, *options)
        assert result.exit_code == code and message in result.stderr, (message, result.output)
