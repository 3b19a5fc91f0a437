"""Assembles the command line from the commands, whose files are imported when they are run."""

from typing import Annotated

import typer

import decodax
from decodax.cli import main as main
from decodax.cli.late_commands import late_group
from decodax.cli.prompts import PromptCommand

COMMANDS = ("generate", "perplexity", "bench", "convert", "plan", "methods")
TRAIN_COMMANDS = (
    "draft",
    "layer_skip",
    "ppd",
    "specee",
    "kangaroo",
    "skip_decode",
    "first_gates",
    "first",
    "medusa",
    "medusa_joint",
)
_EXIT_CODES = (
    "Exit codes: 0 done; 1 failed, with one line on stderr that says why (--debug: the whole traceback); 2 the command "
    "line is wrong; 130 interrupted (143 by SIGTERM); 141 the reader of the output went away."
)

app = typer.Typer(
    cls=late_group(COMMANDS, {"generate": PromptCommand}, epilog=_EXIT_CODES),
    help="Run language models fast, and research how to run them faster.",
    epilog=_EXIT_CODES,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train = typer.Typer(
    cls=late_group(TRAIN_COMMANDS, prefix="train_"),
    help="Train the auxiliary weights that make decoding faster.",
    no_args_is_help=True,
)
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
