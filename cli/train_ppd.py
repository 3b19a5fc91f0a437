"""`decodax train ppd`: prompt tokens for parallel prompt decoding."""

from typing import Annotated, Any

import typer

from decodax.cli import session
from decodax.cli import train_options as option
from decodax.decoding.training.prompt_tokens import PromptTokensShape, PromptTokensTraining


def ppd(
    text: option.Text,
    out: option.Out,
    model: session.ModelName = None,
    dtype: session.Dtype = None,
    tokens: option.Tokens = 2_000_000,
    distances: Annotated[int, typer.Option(min=1, help="How many tokens ahead are guessed.")] = 3,
    ensemble: Annotated[int, typer.Option(min=1, help="Embeddings per distance, whose guesses are averaged.")] = 1,
    batch: option.Batch = option.PLAN.windows_per_step,
    window: option.Window = None,
    short_window: option.ShortWindow = None,
    learning_rate: option.LearningRate = 0.05,
    heldout: option.Heldout = 0.02,
    seed: option.Seed = 0,
    run: option.Run = None,
    as_json: session.Json = False,
    debug: session.Debug = False,
) -> None:
    """Train prompt tokens, which let a model guess several tokens ahead of itself, on your text.

    The model itself stays as it is. The same command goes on with a run that was interrupted; more or fewer --tokens
    move its end.

    Example: decodax train ppd --model ./my-model --text ./my-code -o ./my-prompts
    Then: decodax generate "Once" --model ./my-model --strategy ppd --draft ./my-prompts
    """
    with session.reported_errors(debug):
        schedule = option.Schedule(tokens, batch, window, short_window, learning_rate, "adamw", heldout, seed)
        lm, plan, texts, run = option.prepare(model, dtype, text, out, run, schedule)
        shape = PromptTokensShape(distances, ensemble)
        facts = option.carry_out(PromptTokensTraining(lm, shape, plan, texts, run), out)
        option.report(out, facts, _summary, as_json)


def _summary(facts: dict[str, Any]) -> str:
    shares = ", ".join(f"{ranks[0]:.1%}" for ranks in facts["heldout"]["rank_accuracy"])
    return f"on held-out text the likeliest guess is the model's own token {shares} of the time, distance by distance"
