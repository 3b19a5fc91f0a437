"""`decodax train`: trains the small parts that make decoding a given model faster, one command for each kind."""

import typer

from decodax.cli.train_draft import draft

train = typer.Typer(help="Train the small parts that make decoding faster.", no_args_is_help=True)
train.command()(draft)
