"""`decodax train` trains the auxiliary weights that make decoding faster, with one command for each kind."""

import typer

from decodax.cli.train_draft import draft
from decodax.cli.train_first import first
from decodax.cli.train_first_gates import first_gates
from decodax.cli.train_kangaroo import kangaroo
from decodax.cli.train_layer_skip import layer_skip
from decodax.cli.train_medusa import medusa
from decodax.cli.train_medusa_joint import medusa_joint
from decodax.cli.train_ppd import ppd
from decodax.cli.train_skip_decode import skip_decode
from decodax.cli.train_specee import specee

train = typer.Typer(help="Train the auxiliary weights that make decoding faster.", no_args_is_help=True)
for command in (draft, layer_skip, ppd, specee, kangaroo, skip_decode, first_gates, first, medusa, medusa_joint):
    train.command(command.__name__)(command)  # Typer would write a command's underscore as a dash
