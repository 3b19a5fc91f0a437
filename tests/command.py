"""Starts the frame of the `decodax` command in its own process, without JAX, with a few lines of Python in it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_FRAME = """
import sys, types
commands = types.ModuleType("decodax.cli.app")
exec(sys.argv[1], commands.__dict__)
sys.modules["decodax.cli.app"] = commands
from decodax.cli import main
main()
"""


def start(app: str, redirections: str = "", **options: Any) -> subprocess.Popen[str]:
    """`app` is Python code that defines `app(prog_name)`, in place of Typer's commands.

    redirections: a shell's, such as `>&-`, or what it shall do first, before a semicolon.
    """
    before, _, after = redirections.rpartition(";")
    script = f'{before}\nexec "$0" "$@" {after}'
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.Popen(
        ["sh", "-c", script, sys.executable, "-c", _FRAME, app], cwd=ROOT, text=True, env=environment,
        **(pipes | options),
    )  # fmt: skip


def finish(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; a process that does not end is killed."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    return process.returncode, out, err
