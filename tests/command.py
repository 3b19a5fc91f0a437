"""Starts `decodax` as a process of its own, in which the command is a few lines of Python: its frame without JAX."""

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


def start(app: str, **options: Any) -> subprocess.Popen[str]:
    """`app` is Python that defines `app(prog_name)`, what Typer's commands are otherwise."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", _FRAME, app], cwd=ROOT, text=True, **(pipes | options))


def finish(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; a process that does not end is killed."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    return process.returncode, out, err
