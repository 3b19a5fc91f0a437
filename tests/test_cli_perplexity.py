"""`decodax perplexity` prints what `decoding.scoring.perplexity` finds, and what is wrong with its arguments."""

import json
import shutil
import sys

import numpy as np
import pytest
import tokenizers
from typer.testing import CliRunner

import decodax
from decodax.cli import session
from decodax.cli.app import app
from tests.golden_files import load_golden
from tests.test_cli import CHARACTERS

TEXT = "The cat sat on the mat:\n(A mat)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that reads single characters, with a start token before a text."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(load_golden("llama").folder, folder)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.post_processor = tokenizers.processors.TemplateProcessing("9 $A 8", None, [("9", 66), ("8", 65)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "text.txt").write_text(TEXT)
    return folder


def run(folder, *arguments, stdin=None):
    words = ["perplexity", "--model", folder, *arguments]
    return CliRunner().invoke(app, [str(word) for word in words], input=stdin)


def by_definition(folder, context):
    """The mean over all tokens, in float64, each after the `context - 1` before it."""
    ids = [66, *(CHARACTERS.index(character) for character in TEXT)]
    lm, total = decodax.load(folder), 0.0
    padded = np.zeros((len(ids) - 1, context - 1), np.int32)
    lengths = [min(place, context - 1) for place in range(1, len(ids))]
    for row, (place, length) in enumerate(zip(range(1, len(ids)), lengths, strict=True)):
        padded[row, :length] = ids[place - length : place]
    logits = np.asarray(decodax.logits(lm, padded), np.float64)
    for row, length in enumerate(lengths):
        own = logits[row, length - 1]
        total += own[ids[row + 1]] - own.max() - np.log(np.exp(own - own.max()).sum())
    return -total / (len(ids) - 1)


def test_numbers_are_those_of_the_definition(folder):
    want = by_definition(folder, 8)
    shown = run(folder, "--text", folder / "text.txt", "--context", 8, "--stride", 1)
    assert shown.exit_code == 0, shown.output
    lines = dict(line.split("  ", 1) for line in shown.stdout.splitlines())
    found = {name: float(value.split()[0]) for name, value in lines.items()}
    assert found["tokens"] == len(TEXT)  # all of them, after the start token
    assert found["negative log-likelihood"] == pytest.approx(want, abs=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(want), abs=1e-3)
    read = json.loads(run(folder, "--text", "-", "--context", 8, "--stride", 1, "--json", stdin=TEXT).stdout)
    assert read["negative_log_likelihood"] == pytest.approx(want, abs=1e-5)
    assert (read["num_tokens"], read["context"], read["stride"]) == (len(TEXT), 8, 1)
    assert read["perplexity"] == pytest.approx(np.exp(want), rel=1e-5) and read["model"]["path"] == str(folder)


def test_sizes_have_defaults(folder):
    read = json.loads(run(folder, "--text", folder / "text.txt", "--batch", 3, "--json").stdout)
    context = decodax.load(folder).config.max_position_embeddings
    assert (read["context"], read["stride"]) == (context, context // 2)


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "message"),
    [
        ([], None, 2, "Missing option '--text'"),
        (["--text", "-", "--stride", "9", "--context", "9"], "ab", 2, "stride must be in 1..8"),
        (["--text", "-", "--context", "100000"], "ab", 2, "context must be at most"),
        (["--text", "-", "--batch", "0"], "ab", 2, "--batch"),
        (["--text", "-"], "", 1, "error: stdin is empty: a text to score must hold some text"),
        (["--text", "nowhere"], None, 1, "error: [Errno 2] No such file or directory: 'nowhere'"),
    ],
)
def test_mistakes_are_one_line(folder, arguments, stdin, code, message):
    done = run(folder, *arguments, stdin=stdin)
    assert done.exit_code == code and message in " ".join(done.output.replace("│", " ").split())


def test_a_model_without_a_tokenizer_is_refused(folder):
    done = run(load_golden("llama").folder, "--text", folder / "text.txt")
    assert done.exit_code == 1 and "has no tokenizer.json" in done.stderr


def test_a_bar_shows_how_much_is_done(folder, monkeypatch):
    monkeypatch.setattr(session, "_SILENT_SECONDS", 0.0)
    bars = []

    class Display(session._Display):
        def __init__(self, bar=None):
            super().__init__(bar)
            bars.append(self)
            self.done = []

        def show_done(self, amount):
            super().show_done(amount)
            self.done.append(amount)

    monkeypatch.setattr(session, "_Display", Display)
    with monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True)
        with session.progress_of("scoring", 7) as show, session.progress("waiting") as end:
            show(3)
            show(5)
            end()
    assert bars[0].done == [3, 5] and bars[0]._bar.tasks[0].completed == 5 and bars[0]._bar.tasks[0].total == 7
    assert bars[1]._ended and bars[1]._bar.tasks[0].total is None
