"""`decodax train first`: routers that leave out layers for a text, then a change that makes up for those left out."""

from pathlib import Path
from typing import Annotated, Any

import typer

from decodax.cli import session
from decodax.cli import train_options as option
from decodax.decoding.trained_part import find_part
from decodax.decoding.training.routed_layers import (
    RoutedChangeShape,
    RoutedChangeTraining,
    RoutedShape,
    RouterTraining,
)

SHAPE = RoutedShape()


def first(
    text: option.Text,
    out: option.Out,
    model: session.ModelName = None,
    dtype: session.Dtype = None,
    routers: Annotated[
        Path | None, typer.Option(help="Folder of trained routers, for the second stage. Default: train routers.")
    ] = None,
    tokens: option.Tokens = 1_000_000,
    regulariser: Annotated[
        float | None, typer.Option(min=0, help=f"First stage: higher skips more. Default: {SHAPE.regulariser}.")
    ] = None,
    decisiveness: Annotated[
        float | None,
        typer.Option(min=0, help=f"First stage: keeps routers from wavering. Default: {SHAPE.decisiveness}."),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Second stage: of the change. Default: 16.")] = None,
    batch: option.Batch = option.PLAN.windows_per_step,
    window: option.Window = None,
    short_window: option.ShortWindow = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="The highest. Default: 0.02 for routers, 0.002 for the change.")
    ] = None,
    heldout: option.Heldout = 0.02,
    seed: option.Seed = 0,
    run: option.Run = None,
    as_json: session.Json = False,
    debug: session.Debug = False,
) -> None:
    """Train a model to leave out the layers that a text does not need, on your text, in two stages.

    First routers, which can be used as they are; then, with --routers, a small change of the layers that remain. The
    model itself stays as it is. The same command goes on with a run that was interrupted.

    Example: decodax train first --model ./my-model --text ./my-code -o ./my-routers
    And: decodax train first --model ./my-model --text ./my-code --routers ./my-routers -o ./my-part
    Then: decodax generate "Once" --model ./my-model --strategy first --draft ./my-part
    """
    with session.reported_errors(debug):
        rate = learning_rate or (0.02 if routers is None else 0.002)
        schedule = option.Schedule(tokens, batch, window, short_window, rate, "adamw", heldout, seed)
        _refuse_mixture(routers, regulariser, decisiveness, rank)
        lm, plan, texts, run = option.prepare(model, dtype, text, out, run, schedule)
        if routers is None:
            usual = RoutedShape()
            shape = RoutedShape(
                usual.regulariser if regulariser is None else regulariser,
                usual.decisiveness if decisiveness is None else decisiveness,
            )
            facts = option.carry_out(RouterTraining(lm, shape, plan, texts, run), out)
        else:
            found = find_part("first", lm, routers)
            shape = RoutedChangeShape(**(found.shape | {"rank": rank or RoutedChangeShape.rank}))
            training = RoutedChangeTraining(lm, shape, plan, texts, run, found.params["routers"])
            facts = option.carry_out(training, out)
        option.report(out, facts, _summary, as_json)


def _refuse_mixture(
    routers: Path | None, regulariser: float | None, decisiveness: float | None, rank: int | None
) -> None:
    """Raises ValueError for options of the other stage."""
    if routers is None and rank is not None:
        raise ValueError("--rank belongs to the second stage: give the folder of trained routers as --routers")
    if routers is not None and (regulariser is not None or decisiveness is not None):
        raise ValueError("--regulariser and --decisiveness belong to the first stage: leave them out with --routers")


def _summary(facts: dict[str, Any]) -> str:
    found = facts["heldout"]
    return (
        f"on held-out text {found['skip_rate']:.1%} of the layers are skipped, and {found['greedy']:.1%} of the tokens "
        "are the model's own likeliest"
    )
