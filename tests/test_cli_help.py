"""`--help` lists the commands without importing them; what it says of each is the docstring of its function."""

import json
import subprocess
import sys
from importlib import import_module

import pytest
from typer.testing import CliRunner

from decodax.cli.app import COMMANDS, TRAIN_COMMANDS, app

_LISTED = """
import contextlib, io, json, sys
from decodax.cli.app import app
out = io.StringIO()
with contextlib.redirect_stdout(out):
    app(sys.argv[1:], standalone_mode=False)
ours = [name for name in sys.modules if name.split(".")[0] in ("jax", "flax", "decodax")]
print(json.dumps([ours, out.getvalue()]))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_neither_jax_nor_a_command(arguments):
    done = subprocess.run([sys.executable, "-c", _LISTED, *arguments], capture_output=True, text=True, check=True)
    modules, shown = json.loads(done.stdout.splitlines()[-1])
    commands = {f"decodax.cli.{name}" for name in COMMANDS} | {f"decodax.cli.train_{name}" for name in TRAIN_COMMANDS}
    folders = {".".join(name.split(".")[:2]) for name in modules if "." in name}
    assert folders <= {"decodax.cli", "decodax.core"} and not commands.intersection(modules)
    assert shown.strip()


@pytest.mark.parametrize(("prefix", "group", "names"), [("", [], COMMANDS), ("train_", ["train"], TRAIN_COMMANDS)])
def test_every_command_is_listed_with_its_first_sentence(prefix, group, names):
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, [*group, "--help"])
    assert shown.exit_code == 0
    lines = [" ".join(line.strip("│ ").split()) for line in shown.stdout.splitlines()]
    for name in names:
        function = getattr(import_module(f"decodax.cli.{prefix}{name}"), name)
        assert f"{name} {function.__doc__.splitlines()[0]}" in lines


def test_help_of_a_command_is_that_of_its_function():
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["train", "ppd", "--help"])
    assert shown.exit_code == 0 and "--distances" in shown.stdout
    assert "train ppd [OPTIONS]" in shown.stdout
    unknown = CliRunner().invoke(app, ["trian"])
    assert unknown.exit_code == 2 and "No such command 'trian'" in unknown.output
