"""`decodax train draft` distils a small draft model for a model."""

from typing import Annotated, Any

import typer

import decodax
from decodax.cli.train_command import training
from decodax.cli.train_options import PLAN, Ready
from decodax.decoding.training.draft import DRAFT_TOKENS, DraftShape, DraftTraining


def _summary(facts: dict[str, Any]) -> str:
    found, per_forward = facts["heldout"], facts[f"tokens_per_forward_at_{DRAFT_TOKENS}"]
    return (
        f"on {found['tokens']:,} held-out tokens the draft predicts the model's most probable token at "
        f"{found['greedy']:.1%} of the positions;\nspeculative sampling would accept {found['sampling']:.1%}. With "
        f"{DRAFT_TOKENS} draft tokens that is {per_forward['greedy']:.2f} tokens per forward of the model when "
        f"greedy, {per_forward['sampling']:.2f} at temperature 1"
    )


@training(summary=_summary, tokens=20_000_000, learning_rate=PLAN.peak, optimizer=PLAN.optimizer)
def draft(
    ready: Ready,
    hidden_size: Annotated[
        int | None, typer.Option(min=2, help="Width. Default: half the model's, 512 at most.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Fewer layers draft faster.")] = 2,
    heads: Annotated[int, typer.Option(min=1, help="Heads of attention.")] = 4,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key-value heads.")] = 2,
    head_size: Annotated[int | None, typer.Option(min=2, help="Default: about the width over the heads.")] = None,
    feed_forward: Annotated[int | None, typer.Option(min=1, help="Default: two and a half times the width.")] = None,
) -> DraftTraining:
    """Train a small draft model for a model, on your text.

    The draft learns to predict what the model predicts. It is written as a Hugging Face folder, with what was measured
    in draft.json and the loss curve in loss.png. The same command resumes an interrupted run; more or
    fewer --tokens move its end.

    Example: decodax train draft --model ./my-model --text ./my-code -o ./my-draft
    """
    shape = _shape(ready.lm, hidden_size, layers, heads, kv_heads, head_size, feed_forward)
    return DraftTraining(ready.lm, shape, ready.plan, ready.texts, ready.run)


def _shape(
    lm: decodax.LanguageModel,
    hidden_size: int | None,
    layers: int,
    heads: int,
    kv_heads: int,
    head_size: int | None,
    feed_forward: int | None,
) -> DraftShape:
    """The draft's sizes; those not given follow from the model's width."""
    width = hidden_size or max(2, min(512, lm.config.hidden_size // 2))
    head_size = head_size or max(2, width // heads // 2 * 2)  # even: RoPE turns pairs
    return DraftShape(width, layers, heads, kv_heads, head_size, feed_forward or 5 * width // 2)
