"""`decodax train kangaroo` trains the adapter with which a model's first layers draft for all of them."""

from typing import Annotated, Any

import typer

from decodax.cli.train_command import training
from decodax.cli.train_options import PLAN, Ready
from decodax.decoding.training.kangaroo import KangarooShape, KangarooTraining


def _summary(facts: dict[str, Any]) -> str:
    found, expected = facts["heldout"], facts["greedy_tokens_per_full_forward"]
    best = max(range(len(expected)), key=expected.__getitem__)
    return (
        f"on {found['tokens']:,} held-out tokens the exit predicts the model's most probable token at "
        f"{found['greedy']:.1%} of the positions.\nWith drafts of {best + 1} that is {expected[best]:.2f} tokens per "
        "run of all layers (adapter and head not counted), and more where drafts end when unsure"
    )


@training(summary=_summary, tokens=2_000_000, learning_rate=0.03, optimizer=PLAN.optimizer)
def kangaroo(
    ready: Ready,
    exit_layer: Annotated[
        int, typer.Option(min=1, help="Layers that draft. Fewer draft faster, more are right more often.")
    ] = 2,
) -> KangarooTraining:
    """Train the adapter of an early exit, through which a model's first layers draft for all of them, on your text.

    The model itself stays as it is. The same command resumes an interrupted run; more or fewer --tokens move its end.

    Example: decodax train kangaroo --model ./my-model --text ./my-code --exit-layer 2 -o ./my-adapter
    Then: decodax generate "Once" --model ./my-model --strategy kangaroo --draft ./my-adapter
    """
    return KangarooTraining(ready.lm, KangarooShape(exit_layer), ready.plan, ready.texts, ready.run)
