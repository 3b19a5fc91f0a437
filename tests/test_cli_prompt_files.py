"""`decodax generate --input --output`: answers a file, goes on past bad lines, and says what does not go together."""

import json

import pytest

from tests.test_cli import GOLDEN, folder, generate, golden_row, spelt

__all__ = ["folder"]  # a fixture


@pytest.fixture
def prompts(tmp_path):
    lines = [{"tokens": golden_row(row, 0)[0].tolist()} for row in range(len(GOLDEN.length))]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_file_is_answered(folder, prompts, tmp_path):
    target = tmp_path / "answers.jsonl"
    options = ["--max-new-tokens", "7", "--batch-size", "2", "--dtype", "float32"]
    result = generate(folder, "--input", prompts, "--output", target, *options)
    assert result.exit_code == 0, result.stderr
    assert f"3 answers in {target}; 21 new tokens in " in result.stderr and result.stdout == ""
    for row, line in enumerate(target.read_text().splitlines()):
        answer, wanted = json.loads(line), golden_row(row, 7)[1].tolist()
        assert answer["tokens"] == wanted and answer["text"] == spelt(wanted) and answer["index"] == row
    again = generate(folder, "--input", prompts, "--output", target)
    assert again.exit_code == 1 and "exists already" in again.stderr


def test_a_line_with_an_error_is_named_and_the_exit_code_says_so(folder, prompts, tmp_path):
    target = tmp_path / "answers.jsonl"
    prompts.write_text(prompts.read_text() + "\n{}\n")
    result = generate(folder, "--input", prompts, "--output", target, "--max-new-tokens", "3")
    assert result.exit_code == 1
    assert "1 of 4 prompts have an error in place of an answer; the first is prompt 3 of the file" in result.stderr
    assert "error" in json.loads(target.read_text().splitlines()[3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "a"], "--input and --output go together"),
        (["--input", "a", "--output", "b", "text"], "--input takes the place of prompts"),
        (["--input", "a", "--output", "b", "--n", "2"], "--n and --distributed do not go with --input"),
    ],
)
def test_what_does_not_go_together(arguments, message, folder):
    result = generate(folder, *arguments)
    assert result.exit_code == 2 and message in result.stderr
