"""Assembles the commands of the command line; `session.py` holds what they share."""

from typing import Annotated

import typer

import decodax
from decodax.cli import main as main
from decodax.cli.bench import bench
from decodax.cli.convert import convert
from decodax.cli.generate import generate
from decodax.cli.methods import methods
from decodax.cli.plan import plan
from decodax.cli.prompts import PromptCommand
from decodax.cli.train import train

_EXIT_CODES = (
    "Exit codes: 0 done; 1 failed, with one line on stderr that says why (--debug: the whole traceback); 2 the command "
    "line is wrong; 130 interrupted (143 by SIGTERM); 141 the reader of the output went away."
)

app = typer.Typer(
    help="Run language models fast, and research how to run them faster.",
    epilog=_EXIT_CODES,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=_EXIT_CODES, cls=PromptCommand)(generate)
for command in (bench, convert, plan, methods):
    app.command(epilog=_EXIT_CODES)(command)
app.add_typer(train, name="train", epilog=_EXIT_CODES)


def _print_version(is_given: bool) -> bool:
    if is_given:
        typer.echo(f"decodax {decodax.__version__}")
        raise typer.Exit
    return is_given


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None: ...
