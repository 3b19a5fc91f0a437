"""`decodax train first`: a change of the layers that makes up for those that trained routers leave out."""

from pathlib import Path
from typing import Annotated

import typer

from decodax.cli.train_command import training
from decodax.cli.train_first_routers import summary
from decodax.cli.train_options import Ready
from decodax.decoding.trained_part import find_part
from decodax.decoding.training.routed_layers import RoutedChangeShape, RoutedChangeTraining


@training(summary=summary, tokens=1_000_000, learning_rate=0.002)
def first(
    ready: Ready,
    routers: Annotated[Path, typer.Option(help="The folder that `decodax train first_routers` wrote.")],
    rank: Annotated[int, typer.Option(min=1, help="Of the change of every matrix.")] = RoutedChangeShape.rank,
) -> RoutedChangeTraining:
    """Train a model to do without the layers that its routers leave out, on your text.

    What is written is a small change of the layers, and the routers with it; the model itself stays as it is. The same
    command goes on with a run that was interrupted.

    Example: decodax train first --model ./my-model --text ./my-code --routers ./my-routers -o ./my-part
    Then: decodax generate "Once" --model ./my-model --strategy first --draft ./my-part
    """
    found = find_part("first", ready.lm, routers)
    shape = RoutedChangeShape(**(found.shape | {"rank": rank}))
    return RoutedChangeTraining(ready.lm, shape, ready.plan, ready.texts, ready.run, found.params["routers"])
