"""`decodax train first_routers`: routers with which a model leaves out the layers that a text does not need."""

from typing import Annotated, Any

import typer

from decodax.cli.train_command import training
from decodax.cli.train_options import Ready
from decodax.decoding.training.routed_layers import RoutedShape, RouterTraining

SHAPE = RoutedShape()


def summary(facts: dict[str, Any]) -> str:
    """What the routers do, and what that costs, alone or with the change of `decodax train first`."""
    found = facts["heldout"]
    return (
        f"on held-out text {found['skip_rate']:.1%} of the layers are skipped, and {found['greedy']:.1%} of the tokens "
        "are the model's own likeliest"
    )


@training(summary=summary, tokens=1_000_000, learning_rate=0.02)
def first_routers(
    ready: Ready,
    regulariser: Annotated[float, typer.Option(min=0, help="Higher skips more.")] = SHAPE.regulariser,
    decisiveness: Annotated[float, typer.Option(min=0, help="Keeps routers from wavering.")] = SHAPE.decisiveness,
) -> RouterTraining:
    """Train routers, with which a model leaves out the layers that a text does not need, on your text.

    They can be used as they are, or with a small change of the layers that remain (`decodax train first`). The model
    itself stays as it is. The same command goes on with a run that was interrupted.

    Example: decodax train first_routers --model ./my-model --text ./my-code -o ./my-routers
    Then: decodax generate "Once" --model ./my-model --strategy first --draft ./my-routers
    """
    shape = RoutedShape(regulariser, decisiveness)
    return RouterTraining(ready.lm, shape, ready.plan, ready.texts, ready.run)
