"""`decodax train`: trains the small parts that make decoding a given model faster, one command for each kind."""

import typer

from decodax.cli.train_draft import draft
from decodax.cli.train_first import first
from decodax.cli.train_kangaroo import kangaroo
from decodax.cli.train_layer_skip import layer_skip
from decodax.cli.train_medusa import medusa
from decodax.cli.train_ppd import ppd
from decodax.cli.train_skip_decode import skip_decode
from decodax.cli.train_specee import specee

train = typer.Typer(help="Train the small parts that make decoding faster.", no_args_is_help=True)
train.command()(draft)
train.command("layer_skip")(layer_skip)
train.command()(ppd)
train.command()(specee)
train.command()(kangaroo)
train.command("skip_decode")(skip_decode)
train.command()(first)
train.command()(medusa)
