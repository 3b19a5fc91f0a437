"""`decodax train first` trains a LoRA adapter that compensates for the layers that layer gates skip."""

from pathlib import Path
from typing import Annotated

import typer

from decodax.cli.train_command import training
from decodax.cli.train_first_gates import summary
from decodax.cli.train_options import Ready
from decodax.decoding.auxiliary_weights import find_auxiliary_weights
from decodax.decoding.training.routed_layers import RoutedChangeShape, RoutedChangeTraining


@training(summary=summary, tokens=1_000_000, learning_rate=0.002)
def first(
    ready: Ready,
    layer_gates: Annotated[Path, typer.Option(help="The folder that `decodax train first_gates` wrote.")],
    rank: Annotated[int, typer.Option(min=1, help="Of the change of every matrix.")] = RoutedChangeShape.rank,
) -> RoutedChangeTraining:
    """Train a model to do without the layers that its layer gates skip, on your text.

    The output is a LoRA adapter of the layers, with the layer gates; the model itself stays as it is. The same
    command resumes an interrupted run.

    Example: decodax train first --model ./my-model --text ./my-code --layer-gates ./my-gates -o ./my-change
    Then: decodax generate "Once" --model ./my-model --strategy first --draft ./my-change
    """
    found = find_auxiliary_weights("first", ready.lm, layer_gates)
    shape = RoutedChangeShape(**(found.shape | {"rank": rank}))
    return RoutedChangeTraining(ready.lm, shape, ready.plan, ready.texts, ready.run, found.params["layer_gates"])
