"""`decodax train draft` makes a draft from a folder of text, interrupted or not; errors, and options of all kinds."""

import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from typer.testing import CliRunner

import decodax
from decodax.cli.app import TRAIN_COMMANDS, app
from decodax.decoding.training.export import write_model
from decodax.decoding.training.text_windows import TextWindows
from decodax.models.configs.hf_config import read_config
from decodax.models.model import Model
from tests.tiny import TINY_LLAMA

CHARACTERS = "abcdefghijklmnopqrstuvwxyz ():\n"
CONFIG = TINY_LLAMA | {"max_position_embeddings": 64, "eos_token_id": 5}
SIZES = ["--hidden-size=12", "--layers=1", "--heads=2", "--kv-heads=1", "--head-size=6", "--feed-forward=17"]
TEN_STEPS = ["--batch=3", "--window=14", "--short-window=14", "--tokens=420", "--optimizer=adamw", "--heldout=0.2"]
# Options shared by all kinds, in the order of --help: a kind's own options are between the two.
SHARED_BEFORE = ["--text", "--out", "--model", "--dtype", "--tokens"]
SHARED_AFTER = ["--batch", "--window", "--short-window", "--learning-rate", "--optimizer", "--heldout", "--seed"]
SHARED_AFTER += ["--run", "--json", "--debug", "--help"]
WITHOUT_OPTIMIZER = {"ppd", "skip_decode", "first_gates", "first"}  # always adamw
KINDS = list(TRAIN_COMMANDS)
pytestmark = pytest.mark.usefixtures("optax_may_promote")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny target that reads and writes single characters."""
    folder = tmp_path_factory.mktemp("model")
    params = Model(read_config(CONFIG)[1]).init(jax.random.key(0))
    write_model(folder, CONFIG, params, "float32")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of three texts."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "below").mkdir()
    for name, character in (("one.py", "x"), ("two.txt", "y"), ("below/three.py", "z")):
        (folder / name).write_text("".join(f"def {character}{a}(b):\n  return b\n" for a in CHARACTERS[:8]))
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["train", "draft", *map(str, arguments)])


@pytest.fixture(scope="module")
def uninterrupted(model, text, tmp_path_factory):
    """The folder of a draft trained in one go, and what the command printed."""
    out = tmp_path_factory.mktemp("whole") / "draft"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = run("--model", model, "--text", text, "-o", out, "--json", *SIZES, *TEN_STEPS)
    assert result.exit_code == 0, result.output
    return out, result


@pytest.mark.slow
def test_a_draft_is_written_with_its_measurements(model, uninterrupted):
    out, result = uninterrupted
    facts = json.loads(result.stdout)
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "draft.json", "loss.png", "model.safetensors"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((out / "draft.json").read_text())
    assert {name: facts[name] for name in written} == written and facts["path"] == str(out)
    assert (written["target_vocab_size"], written["trained_tokens"], written["plan"]["steps"]) == (37, 420, 10)
    draft, target = decodax.load(out), decodax.load(model)
    assert draft.config.vocab_size == target.config.vocab_size and draft.end_token_ids == (5,)
    assert draft.tokenizer is None and draft.config.num_layers == 1 and draft.config.hidden_size == 12
    assert np.isfinite(decodax.logits(draft, jnp.arange(7)[None])).all()
    assert [file.name for file in out.parent.iterdir() if file != out] == ["draft.run"]


@pytest.mark.slow
def test_an_interrupted_run_resumes_and_ends_the_same(model, text, uninterrupted, tmp_path, monkeypatch):
    arguments = [
        "--model",
        model,
        "--text",
        text,
        "-o",
        tmp_path / "draft",
        "--run",
        tmp_path / "work",
        *SIZES,
        *TEN_STEPS,
    ]
    at = TextWindows.at

    def interrupting(self, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return at(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(TextWindows, "at", interrupting)
        stopped = run(*arguments)
    assert stopped.exit_code == 130 and "stopped at step 4 of 10: the same command goes on" in stopped.stderr
    assert not (tmp_path / "draft").exists()
    for ended_while_writing in (False, True):  # to the end; and once more, with nothing left to do but to write
        if ended_while_writing:
            staged = tmp_path / "draft" / ".being_written"
            staged.mkdir()
            (tmp_path / "draft" / "draft.json").rename(staged / "draft.json")
            (tmp_path / "draft" / "config.json").unlink()
            with (tmp_path / "work" / "log.jsonl").open("a") as log:
                log.write('{"step": 1')
        ended = run(*arguments)
        assert ended.exit_code == 0 and "trained on 420 tokens" in ended.stdout
        for name in ("model.safetensors", "config.json", "draft.json"):
            assert (tmp_path / "draft" / name).read_bytes() == (uninterrupted[0] / name).read_bytes()
        assert {file.name for file in (tmp_path / "draft").iterdir()} == {
            file.name for file in uninterrupted[0].iterdir()
        }


def test_failures_are_one_line_with_what_to_do(model, text, uninterrupted, tmp_path):
    out, new = uninterrupted[0], tmp_path / "new"
    (tmp_path / "short.txt").write_text("def")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").mkdir()
    usual = ["--model", model, "--text", text, "-o", out, *SIZES, *TEN_STEPS]
    cases = [
        ([*usual[:3], tmp_path / "short.txt", "-o", new, *usual[6:]], "too little text is held out"),
        ([*usual[:3], tmp_path / "bytes.txt", *usual[4:]], "must be text in UTF-8"),
        ([*usual[:3], tmp_path / "none.txt", *usual[4:]], "there is no file or folder"),
        ([*usual[:3], tmp_path / "empty", *usual[4:]], "the files hold no text"),
        (["--model", tmp_path / "nowhere", *usual[2:]], "no such model folder"),
        (["--model", out, *usual[2:]], "has no tokenizer.json"),
        ([*usual, "--batch=500", "-o", new], "the text must hold more tokens than one step reads (7000)"),
        ([*usual, "--window=65", "--short-window=65", "-o", new], "must be at most 64 (the target's context), got 65"),
        ([*usual, "--optimizer=sgd"], "must be muon or adamw"),
        ([*usual, "--seed=1"], "holds a run with other settings: seed was 0, now 1"),
        ([*usual, "--layers=2", "--run", new], "already holds another model"),
        ([*usual, "--heads=3", "--kv-heads=2", "-o", new], "multiple of num_key_value_heads"),
    ]
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    for arguments, message in cases:
        result = run(*arguments)
        assert result.exit_code == 1, (message, result.output)
        lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], (message, result.stderr)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_help_names_the_options_and_a_wrong_one_is_refused():
    shown = CliRunner().invoke(app, ["train", "draft", "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "--hidden-size" in shown.stdout and "--text" in shown.stdout
    assert run("--tekst", "x").exit_code == 2
    assert CliRunner().invoke(app, ["train"]).exit_code in (0, 2)  # shows the help; the code depends on typer's version


def test_there_is_a_command_for_every_kind():
    assert sorted(KINDS) == [
        "draft", "first", "first_gates", "kangaroo", "layer_skip", "medusa", "medusa_joint", "ppd", "skip_decode",
        "specee",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_shared_options(kind):
    shown = CliRunner().invoke(app, ["train", kind, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and f"Example: decodax train {kind} --model" in shown.stdout, shown.output
    options = re.findall(r"^[│ *]+(--[a-z-]+)", shown.stdout, re.MULTILINE)
    after = [name for name in SHARED_AFTER if name != "--optimizer" or kind not in WITHOUT_OPTIMIZER]
    assert options[:5] == SHARED_BEFORE and options[-len(after) :] == after
    own = options[5 : -len(after)]
    assert own and not set(own) & {*SHARED_BEFORE, *SHARED_AFTER}
    required = re.findall(r"^│ \*\s+(--[a-z-]+)", shown.stdout, re.MULTILINE)
    assert required == ["--text", "--out", *{"first": ["--layer-gates"], "medusa_joint": ["--heads"]}.get(kind, [])]
