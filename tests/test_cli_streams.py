"""Standard streams that are closed, full, abandoned or of another encoding: the command continues, or reports it."""

import io
import os
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import decodax
from decodax.cli import prompts, streams
from decodax.cli.app import app
from tests import command

TEXT = "def app(prog_name): print('text')"
RAISED = "def app(prog_name): print('text', flush=True)"
# How Typer and Rich treat an error when they print.
TURNED = "def app(prog_name):\n    try: print('text', flush=True)\n    except OSError: raise SystemExit(3)"
LOST = "warning: stdout is closed: what is printed there is lost\n"
FULL = "error: stdout cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    ("redirections", "expected"),
    [
        ("", (0, "text\n", "")),
        ("<&-", (0, "text\n", "")),
        (">&-", (0, "", LOST)),
        ("2>&-", (0, "text\n", "")),
        ("2>/dev/full", (0, "text\n", "")),
        ("<&- >&- 2>&-", (0, "", "")),
        (">/dev/full", (1, "", FULL)),
        (">/dev/full 2>&1", (1, "", "")),
    ],
)
def test_streams_that_are_closed_or_full(redirections: str, expected: tuple[int, str, str]):
    said = "def app(prog_name):\n    import sys; print('said', file=sys.stderr) if sys.argv[2:] else print('text')"
    assert command.finish(command.start(said, redirections)) == expected


@pytest.mark.parametrize("app", [TEXT, RAISED, TURNED])
def test_a_closed_reader_and_a_full_disk_differ_however_they_are_raised(app: str):
    read, write = os.pipe()
    os.close(read)
    process = command.start(app, stdout=write)
    os.close(write)
    assert command.finish(process) == (streams.READER_GONE, None, "")
    assert command.finish(command.start(app, ">/dev/full")) == (1, "", FULL)


def test_a_file_never_gets_the_descriptor_of_a_closed_stream(tmp_path: Path):
    number = tmp_path / "number"
    opened = f"def app(prog_name):\n    with open({str(number)!r}, 'w') as file: file.write(str(file.fileno()))"
    assert command.finish(command.start(opened, "<&- >&- 2>&-"))[0] == 0
    assert int(number.read_text()) > 2


SHOWN = {"ascii": "\\u4f60 \\xe9", "latin-1": "\\u4f60 é", "utf-8": "你 é"}


@pytest.mark.parametrize(("encoding", "shown"), SHOWN.items())
def test_characters_outside_the_encoding_are_escaped(encoding: str, shown: str):
    process = command.start(
        "def app(prog_name): print('\\u4f60 \\xe9')", env={"PYTHONIOENCODING": encoding}, encoding=encoding
    )
    assert command.finish(process) == (0, shown + "\n", "")


@pytest.mark.parametrize(("columns", "kept"), [("0", None), ("-5", None), ("wide", None), ("3", None), ("72", "72")])
def test_an_implausible_terminal_width_is_ignored(columns: str, kept: str | None):
    process = command.start("def app(prog_name): import os; print(os.environ.get('COLUMNS'))", env={"COLUMNS": columns})
    assert command.finish(process) == (0, f"{kept}\n", "")


def test_an_error_of_another_file_is_not_one_of_stdout():
    raises = "def app(prog_name): raise BrokenPipeError(32, 'of a socket')"
    code, _, err = command.finish(command.start(raises))
    assert code == 1 and "of a socket" in err


def test_an_argument_is_utf_8_whatever_the_locale():
    """Under an ASCII locale Python gives the bytes as lone surrogates."""
    assert prompts.as_text("é", "x") == "é"
    assert prompts.as_text(os.fsdecode(b"a\xff")[:1], "x") == "a"
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = "from decodax.cli.prompts import as_text; import sys; print(ascii(as_text(sys.argv[2], 'prompt 0')))"
    process = command.start(f"def app(prog_name):\n    {code}", "set -- \"$@\" 'h\u00e9 \u4f60'; ", env=ascii_locale)
    assert command.finish(process) == (0, "'h\\xe9 \\u4f60'\n", "")


@pytest.mark.parametrize("argument", [b"a\xff", b"\xe4\xbd", b"\xed\xa0\x80"])
def test_an_argument_that_is_not_text_is_refused(argument: bytes):
    with pytest.raises(typer.BadParameter, match="prompt 3 must be text in UTF-8"):
        prompts.as_text(os.fsdecode(argument), "prompt 3")
    for words in (["generate", os.fsdecode(argument)], ["generate", "x", "--stop", os.fsdecode(argument)]):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 2 and "must be text in UTF-8" in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize("prompt", ["-x", "- an item", "--- a/file", "-1"])
def test_a_prompt_taken_for_an_option_is_explained(prompt: str):
    done = CliRunner().invoke(app, ["generate", prompt])
    assert done.exit_code == 2 and 'generate -- "-x"' in " ".join(done.output.replace("│", " ").split())


def test_a_misspelt_option_is_refused():
    done = CliRunner().invoke(app, ["generate", "x", "--max-new-token", "3"])
    assert done.exit_code == 2 and "--max-new-tokens" in done.output and "-- " not in done.output.replace("---", "")


def test_prompts_after_two_dashes_are_prompts(monkeypatch: pytest.MonkeyPatch):
    given: list[list[str]] = []
    monkeypatch.setattr("decodax.cli.generate._run", lambda lm, texts, *_: given.append(texts))
    monkeypatch.setattr(decodax, "load", lambda *_, **__: None)
    monkeypatch.setattr("decodax.cli.generate._check_values", lambda *_: None)
    done = CliRunner().invoke(app, ["generate", "--no-compilation-cache", "--", "-x", "--max-new-tokens", "- a"])
    assert done.exit_code == 0 and given == [["-x", "--max-new-tokens", "- a"]], done.output


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfa", "a"),
        (b"a\r\nb\r", "a\r\nb\r"),
        (b"a\x00b", "a\x00b"),
        (b"\n", "\n"),
        (b"", "is empty: a prompt must hold some text"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"\xff\xfea\x00", "must be text in UTF-8 (it looks like UTF-16)"),
        (b"a\xe9", "must be text in UTF-8"),
    ],
)
def test_bytes_of_a_file_and_of_stdin(content: bytes, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "prompt"
    file.write_bytes(content)
    for source, name in ((str(file), str(file)), ("-", "stdin")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        try:
            found = prompts.read_prompts([], [source])
        except ValueError as error:
            found = [str(error).removeprefix(f"{name} ")]
        assert found[0][: len(expected)] == expected
        assert len(found[0]) == len(expected) or " " in expected


def test_a_closed_stdin_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="stdin is closed"):
        prompts.read_prompts(["-"], [])
