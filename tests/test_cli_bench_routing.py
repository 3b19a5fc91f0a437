"""`decodax bench --routing` writes a trace, a picture and a summary; bad input is refused."""

import json

import pytest
from typer.testing import CliRunner

from decodax.cli.app import app
from decodax.decoding.routing_trace import RoutingTrace
from tests.golden_files import load_golden

MODEL = ["--model", str(load_golden("qwen3_moe").folder), "--dtype", "float32"]


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.mark.slow
def test_writes_a_trace_and_its_picture(tmp_path):
    file = tmp_path / "trace.npz"
    sizes = ["--batch", 2, "--prompt-tokens", 9, "--new-tokens", 4]
    result = run(*MODEL, "--routing", file, *sizes, "--json")
    assert result.exit_code == 0, result.stderr
    summary, trace = json.loads(result.stdout), RoutingTrace.load(file)
    assert len(trace.token) == summary["tokens"] == 2 * (9 + 4) and trace.is_output.sum() == 2 * 4
    assert [row["experts"] for row in summary["layers"]] == [7, 7, 7]
    assert all(1 <= row["busiest_over_average"] <= 7 / 3 for row in summary["layers"])  # 3 of 7 for each token
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.npz", "trace.png"]
    shown = run(*MODEL, "--routing", file, *sizes)
    assert shown.exit_code == 0 and "26 tokens" in shown.stdout and "never chosen" in shown.stdout


def test_bad_input_is_refused(tmp_path):
    assert "must be a file name ending in .npz" in run(*MODEL, "--routing", tmp_path / "trace.txt").stderr
    (tmp_path / "texts").write_text("one\n")
    assert "are prompts for --routing" in run(*MODEL, "--texts", tmp_path / "texts").stderr
    (tmp_path / "texts").write_text("\n \n")
    result = run(*MODEL, "--routing", tmp_path / "trace.npz", "--texts", tmp_path / "texts")
    assert result.exit_code == 1 and "holds no text: one prompt per line" in result.stderr
    dense = ["--model", str(load_golden("qwen3").folder)]
    result = run(*dense, "--routing", tmp_path / "trace.npz", "--prompt-tokens", 3, "--new-tokens", 2)
    assert result.exit_code == 1 and "has no layers with experts" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]
