"""`decodax train kangaroo`: the adapter with which a model's first layers draft for all of them."""

from typing import Annotated, Any

import typer

from decodax.cli import session
from decodax.cli import train_options as option
from decodax.decoding.training.kangaroo import KangarooShape, KangarooTraining


def kangaroo(
    text: option.Text,
    out: option.Out,
    model: session.ModelName = None,
    dtype: session.Dtype = None,
    tokens: option.Tokens = 2_000_000,
    exit_layer: Annotated[
        int, typer.Option(min=1, help="Layers that draft. Fewer draft faster, more are right more often.")
    ] = 2,
    batch: option.Batch = option.PLAN.windows_per_step,
    window: option.Window = None,
    short_window: option.ShortWindow = None,
    learning_rate: option.LearningRate = 0.03,
    optimizer: option.Optimizer = option.PLAN.optimizer,
    heldout: option.Heldout = 0.02,
    seed: option.Seed = 0,
    run: option.Run = None,
    as_json: session.Json = False,
    debug: session.Debug = False,
) -> None:
    """Train the adapter of an early exit, through which a model's first layers draft for all of them, on your text.

    The model itself stays as it is. The same command goes on with a run that was interrupted; more or fewer --tokens
    move its end.

    Example: decodax train kangaroo --model ./my-model --text ./my-code --exit-layer 2 -o ./my-adapter
    Then: decodax generate "Once" --model ./my-model --strategy kangaroo --draft ./my-adapter
    """
    with session.reported_errors(debug):
        schedule = option.Schedule(tokens, batch, window, short_window, learning_rate, optimizer, heldout, seed)
        lm, plan, texts, run = option.prepare(model, dtype, text, out, run, schedule)
        facts = option.carry_out(KangarooTraining(lm, KangarooShape(exit_layer), plan, texts, run), out)
        option.report(out, facts, _summary, as_json)


def _summary(facts: dict[str, Any]) -> str:
    found, expected = facts["heldout"], facts["greedy_tokens_per_full_depth"]
    best = max(range(len(expected)), key=expected.__getitem__)
    return (
        f"on {found['tokens']:,} held-out tokens the exit finds the model's likeliest token at {found['greedy']:.1%} "
        f"of the positions.\nWith drafts of {best + 1} that is {expected[best]:.2f} tokens per run of all layers "
        "(adapter and head not counted), and more where drafts end when unsure"
    )
