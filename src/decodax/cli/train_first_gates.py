"""`decodax train first_gates` trains layer gates, which skip the layers that a text does not need."""

from typing import Annotated, Any

import typer

from decodax.cli.train_command import training
from decodax.cli.train_options import Ready
from decodax.decoding.training.routed_layers import LayerGateTraining, RoutedShape

SHAPE = RoutedShape()


def summary(facts: dict[str, Any]) -> str:
    """Layers skipped and tokens kept, with the layer gates alone or with the change of `decodax train first`."""
    found = facts["heldout"]
    return (
        f"on held-out text {found['skip_rate']:.1%} of the layers are skipped, and {found['greedy']:.1%} of the tokens "
        "are the model's own most probable"
    )


@training(summary=summary, tokens=1_000_000, learning_rate=0.02)
def first_gates(
    ready: Ready,
    regulariser: Annotated[float, typer.Option(min=0, help="Higher skips more.")] = SHAPE.regulariser,
    decisiveness: Annotated[float, typer.Option(min=0, help="Keeps the layer gates decided.")] = SHAPE.decisiveness,
) -> LayerGateTraining:
    """Train layer gates, with which a model skips the layers that a text does not need, on your text.

    They can be used as they are, or with a LoRA adapter of the layers that remain (`decodax train first`). The model
    itself stays as it is. The same command resumes an interrupted run.

    Example: decodax train first_gates --model ./my-model --text ./my-code -o ./my-gates
    Then: decodax generate "Once" --model ./my-model --strategy first --draft ./my-gates
    """
    shape = RoutedShape(regulariser, decisiveness)
    return LayerGateTraining(ready.lm, shape, ready.plan, ready.texts, ready.run)
