"""`decodax train medusa`: heads that guess several tokens ahead, alone or together with a change of the model."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import decodax
from decodax.cli import session
from decodax.cli import train_options as option
from decodax.decoding.drafters.medusa_heads import MedusaShape
from decodax.decoding.trained_part import find_part
from decodax.decoding.training.medusa import MedusaTraining
from decodax.decoding.training.medusa_joint import MedusaJointShape, MedusaJointTraining
from decodax.decoding.training.plan import Plan
from decodax.decoding.training.self_distillation import self_distilled
from decodax.decoding.training.texts import Texts


def medusa(
    text: option.Text,
    out: option.Out,
    model: session.ModelName = None,
    dtype: session.Dtype = None,
    tokens: option.Tokens = 2_000_000,
    heads: Annotated[int | None, typer.Option(min=1, help="How many tokens ahead are guessed. Default: 4.")] = None,
    blocks: Annotated[int | None, typer.Option(min=1, help="Residual blocks per head. Default: 1.")] = None,
    own_heads: Annotated[
        bool | None,
        typer.Option("--own-heads/--tied", help="An output matrix per head, or the model's own. Default: --tied."),
    ] = None,
    joint: Annotated[
        Path | None, typer.Option(help="Heads that this command made: train them on, and the model with them.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="With --joint: rank of the model's change. Default: 16.")
    ] = None,
    labels: Annotated[str, typer.Option(help="What heads learn to find: the model's tokens, or the text's.")] = "model",
    stride: Annotated[int, typer.Option(min=1, help="Learn from every so many-th position; more saves memory.")] = 1,
    self_distill: Annotated[
        int,
        typer.Option(min=0, help="Train on so many texts that the model writes itself, begun with pieces of yours."),
    ] = 0,
    batch: option.Batch = option.PLAN.windows_per_step,
    window: option.Window = None,
    short_window: option.ShortWindow = None,
    learning_rate: option.LearningRate = option.PLAN.peak,
    optimizer: option.Optimizer = option.PLAN.optimizer,
    heldout: option.Heldout = 0.02,
    seed: option.Seed = 0,
    run: option.Run = None,
    as_json: session.Json = False,
    debug: session.Debug = False,
) -> None:
    """Train Medusa heads, which guess several tokens ahead of a model, on your text.

    The model itself stays as it is; with --joint it is changed a little, so that it is easier to guess, and what is
    decoded with the result is the changed model's text. The same command goes on with a run that was interrupted.

    Example: decodax train medusa --model ./my-model --text ./my-code -o ./my-heads
    Then: decodax generate "Once" --model ./my-model --strategy medusa --draft ./my-heads
    """
    with session.reported_errors(debug):
        schedule = option.Schedule(tokens, batch, window, short_window, learning_rate, optimizer, heldout, seed)
        lm, plan, texts, run = option.prepare(model, dtype, text, out, run, schedule)
        if self_distill:
            texts = _own_words(lm, texts, self_distill, plan)
        if joint is None:
            if rank is not None:
                raise ValueError("--rank is that of the model's change: give --joint FOLDER with it, or leave it out")
            default = MedusaShape()
            shape = MedusaShape(heads or default.heads, blocks or default.blocks, not own_heads)
            training = MedusaTraining(lm, shape, plan, texts, run, labels, stride)
        else:
            if (heads, blocks, own_heads) != (None, None, None):
                raise ValueError(
                    "with --joint the heads have the shape that they were trained in: leave out their sizes"
                )
            start = find_part("medusa", lm, joint)
            sizes = (start.shape[name] for name in ("heads", "blocks", "tied"))
            shape = MedusaJointShape(*sizes, rank=MedusaJointShape.rank if rank is None else rank)
            training = MedusaJointTraining(lm, shape, plan, texts, run, labels, stride, start=start)
        facts = option.carry_out(training, out)
        option.report(out, facts, _summary, as_json)


def _own_words(lm: decodax.LanguageModel, texts: Texts, count: int, plan: Plan) -> Texts:
    """The texts with those to learn from replaced by the model's own, as long as a window, 256 tokens at most."""
    size = min(256, plan.window_tokens)
    sizes = {"seed_tokens": max(1, size // 8), "new_tokens": size - max(1, size // 8)}
    with session.progress("letting the model write"):
        written = self_distilled(lm, texts.train, count, **sizes, temperature=0.7, seed=plan.seed)
    return replace(texts, train=written)


def _summary(facts: dict[str, Any]) -> str:
    found = facts["heldout"]
    shares = ", ".join(f"{ranks[0]:.1%}" for ranks in found["rank_accuracy"])
    changed = (
        f"\nthe changed model's likeliest token is the original's {found['unchanged']:.1%} of the time"
        if "unchanged" in found
        else ""
    )
    return f"on held-out text the likeliest guess is the model's own token {shares} of the time, head by head{changed}"
