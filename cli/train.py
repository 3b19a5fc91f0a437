"""`decodax train`: trains the small parts that make decoding a given model faster."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import decodax
from decodax.cli import session
from decodax.decoding.training.draft import DRAFT_TOKENS, DraftShape, DraftTraining, Texts, hold_out
from decodax.decoding.training.loop import resumed_plan
from decodax.decoding.training.plan import Plan
from decodax.decoding.training.text_files import encode, read_texts

train = typer.Typer(help="Train the small parts that make decoding faster.", no_args_is_help=True)

_PLAN = Plan()


@train.command()
def draft(
    text: Annotated[
        list[Path],
        typer.Option(
            help="A file to train on, or a folder of them (may be repeated): text like what is to be decoded."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write the draft to.")],
    model: session.ModelName = None,
    dtype: session.Dtype = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to train on, in all passes over the text.")] = 20_000_000,
    hidden_size: Annotated[
        int | None, typer.Option(min=2, help="Width. Default: half the model's, 512 at most.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Fewer layers draft faster.")] = 2,
    heads: Annotated[int, typer.Option(min=1, help="Heads of attention.")] = 4,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key-value heads.")] = 2,
    head_size: Annotated[int | None, typer.Option(min=2, help="Default: about the width over the heads.")] = None,
    feed_forward: Annotated[int | None, typer.Option(min=1, help="Default: two and a half times the width.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows per step.")] = _PLAN.windows_per_step,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window. Default: 1024, or the model's context.")
    ] = None,
    short_window: Annotated[
        int | None, typer.Option(min=1, help="Tokens per row until the last part of the run. Default: a quarter.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="The highest; it warms up, and falls in the end.")] = _PLAN.peak,
    optimizer: Annotated[str, typer.Option(help="muon or adamw.")] = _PLAN.optimizer,
    heldout: Annotated[
        float, typer.Option(min=0.001, max=0.5, help="Share of the text to judge on, and not to train on.")
    ] = 0.02,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other weights and another order.")] = 0,
    run: Annotated[
        Path | None, typer.Option(help="The folder for checkpoints and the log. Default: beside OUT, ending in .run.")
    ] = None,
    as_json: session.Json = False,
    debug: session.Debug = False,
) -> None:
    """Train a small draft model for a model, on your text.

    The draft learns to predict what the model predicts. It is written as a Hugging Face folder, with what was measured
    in draft.json and the loss curve in loss.png. The same command goes on with a run that was interrupted; more or
    fewer --tokens move its end.

    Example: decodax train draft --model ./my-model --text ./my-code -o ./my-draft
    """
    with session.reported_errors(debug):
        run = run or out.with_name(f"{out.name}.run")
        lm = decodax.load(model, dtype=dtype)
        window = window or min(_PLAN.window_tokens, lm.config.max_position_embeddings)
        plan = Plan(
            peak=learning_rate,
            windows_per_step=batch,
            window_tokens=window,
            short_tokens=short_window or (window if window % 4 else window // 4),
            optimizer=optimizer,
            seed=seed,
        ).finishing_by(max(1, tokens // (batch * window)))
        shape = _shape(lm, hidden_size, layers, heads, kv_heads, head_size, feed_forward)
        with session.progress("reading the text"):
            texts = _texts(lm, text, heldout, seed)
        training = DraftTraining(lm, shape, resumed_plan(run, plan), texts, run)
        training.refuse_foreign(out)
        trained = training.train()
        if not trained.finished:
            print(f"stopped at step {trained.step} of {training.plan.steps}: the same command goes on", file=sys.stderr)
            raise typer.Exit(session.INTERRUPTED)
        with session.progress("measuring"):
            facts = training.export(out, trained.params, trained.step, out / "loss.png")
        print(
            json.dumps(facts | {"path": str(out), "versions": session.versions()}) if as_json else _summary(out, facts)
        )


def _shape(
    lm: decodax.LanguageModel,
    hidden_size: int | None,
    layers: int,
    heads: int,
    kv_heads: int,
    head_size: int | None,
    feed_forward: int | None,
) -> DraftShape:
    """The draft's sizes, with what was not given derived from the model's width."""
    width = hidden_size or max(2, min(512, lm.config.hidden_size // 2))
    head_size = head_size or max(2, width // heads // 2 * 2)  # even: RoPE turns pairs
    return DraftShape(width, layers, heads, kv_heads, head_size, feed_forward or 5 * width // 2)


def _texts(lm: decodax.LanguageModel, paths: list[Path], heldout: float, seed: int) -> Texts:
    if lm.tokenizer is None:
        raise ValueError(f"{lm.path} has no tokenizer.json: the text cannot be turned into the model's tokens")
    train_ids, heldout_ids = hold_out(encode(lm.tokenizer, read_texts(paths)), heldout, seed)
    return Texts(train_ids, heldout_ids, separator=lm.end_token_ids[:1])


def _summary(out: Path, facts: dict[str, Any]) -> str:
    found, per_forward = facts["heldout"], facts[f"tokens_per_forward_at_{DRAFT_TOKENS}"]
    return (
        f"{out}: {facts['num_parameters']:,} parameters, trained on {facts['trained_tokens']:,} tokens\n"
        f"on {found['tokens']:,} held-out tokens the draft finds the model's likeliest token at "
        f"{found['greedy']:.1%} of the positions;\nspeculative sampling would accept {found['sampling']:.1%}. With "
        f"{DRAFT_TOKENS} drafted tokens that is {per_forward['greedy']:.2f} tokens per forward of the model when "
        f"greedy, {per_forward['sampling']:.2f} at temperature 1"
    )
