"""`decodax train specee`: predictors with which a model's tokens leave its layers early."""

from typing import Annotated, Any

import typer

from decodax.cli import session
from decodax.cli import train_options as option
from decodax.decoding.strategies._drafts import find_draft
from decodax.decoding.training.exit_predictors import ExitPredictorShape, ExitPredictorTraining

SHAPE = ExitPredictorShape()
DraftName = Annotated[
    str | None, typer.Option(help="The draft whose likely tokens are tried: a folder. Default: the embedded model's.")
]


def specee(
    text: option.Text,
    out: option.Out,
    model: session.ModelName = None,
    draft: DraftName = None,
    dtype: session.Dtype = None,
    tokens: option.Tokens = 500_000,
    hidden_size: Annotated[int, typer.Option(min=1, help="Width of each predictor.")] = SHAPE.hidden_size,
    likely_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the draft to try.")] = SHAPE.likely_tokens,
    positions: Annotated[int, typer.Option(min=1, help="Places of each window to learn from.")] = SHAPE.positions,
    batch: option.Batch = option.PLAN.windows_per_step,
    window: option.Window = None,
    short_window: option.ShortWindow = None,
    learning_rate: option.LearningRate = 0.003,
    optimizer: option.Optimizer = "adamw",
    heldout: option.Heldout = 0.02,
    seed: option.Seed = 0,
    run: option.Run = None,
    as_json: session.Json = False,
    debug: session.Debug = False,
) -> None:
    """Train exit predictors for a model and a draft, on your text (SpecEE).

    After each layer a small network learns whether what comes next is settled among the draft's likeliest tokens. The
    folder holds a copy of the draft. The same command goes on with a run that was interrupted.

    Example: decodax train specee --model ./my-model --draft ./my-draft --text ./my-code -o ./my-exits
    """
    with session.reported_errors(debug):
        schedule = option.Schedule(tokens, batch, window, short_window, learning_rate, optimizer, heldout, seed)
        lm, plan, texts, run = option.prepare(model, dtype, text, out, run, schedule)
        found = find_draft("specee", lm, draft).lm
        shape = ExitPredictorShape(hidden_size, likely_tokens, positions)
        facts = option.carry_out(ExitPredictorTraining(lm, shape, plan, texts, run, found), out)
        option.report(out, facts, _summary, as_json)


def _summary(facts: dict[str, Any]) -> str:
    found = facts["heldout"]
    return (
        f"on held-out text the predictors are right at {found['accuracy']:.1%} of the layers; with threshold 0.5 a "
        f"token takes\n{found['mean_layers']:.1f} of {facts['target_layers']} layers, and {found['agreement']:.1%} of "
        "the likeliest tokens stay the model's"
    )
