"""`decodax train specee` trains exit predictors, with which a model's tokens exit early."""

from typing import Annotated, Any

import typer

from decodax.cli.train_command import training
from decodax.cli.train_options import Ready
from decodax.decoding.find_draft import find_draft
from decodax.decoding.training.exit_predictors import ExitPredictorShape, ExitPredictorTraining

SHAPE = ExitPredictorShape()


def _summary(facts: dict[str, Any]) -> str:
    found = facts["heldout"]
    return (
        f"on held-out text the predictors are right at {found['accuracy']:.1%} of the layers; with threshold 0.5 a "
        f"token runs\n{found['mean_layers']:.1f} of {facts['target_layers']} layers, and {found['agreement']:.1%} of "
        "the most probable tokens stay the model's"
    )


@training(summary=_summary, tokens=500_000, learning_rate=0.003, optimizer="adamw")
def specee(
    ready: Ready,
    draft: Annotated[
        str | None,
        typer.Option(help="The draft model whose top-k tokens are tried: a folder. Default: the embedded model's."),
    ] = None,
    hidden_size: Annotated[int, typer.Option(min=1, help="Width of each predictor.")] = SHAPE.hidden_size,
    likely_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the draft to try.")] = SHAPE.likely_tokens,
    positions: Annotated[int, typer.Option(min=1, help="Places of each window to learn from.")] = SHAPE.positions,
) -> ExitPredictorTraining:
    """Train exit predictors for a model and a draft, on your text (SpecEE).

    After each layer a small network learns whether the next token is already decided among the draft's most probable
    ones. The folder holds a copy of the draft. The same command resumes an interrupted run.

    Example: decodax train specee --model ./my-model --draft ./my-draft --text ./my-code -o ./my-exits
    """
    found = find_draft("specee", ready.lm, draft).lm
    shape = ExitPredictorShape(hidden_size, likely_tokens, positions)
    return ExitPredictorTraining(ready.lm, shape, ready.plan, ready.texts, ready.run, found)
