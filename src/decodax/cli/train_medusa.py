"""`decodax train medusa` trains Medusa heads, which predict several tokens ahead; the model stays frozen."""

from dataclasses import replace
from typing import Annotated, Any

import typer

from decodax.cli import session
from decodax.cli.train_command import training
from decodax.cli.train_options import PLAN, Ready
from decodax.decoding.training.medusa import MedusaTraining
from decodax.decoding.training.self_distillation import self_distilled
from decodax.decoding.training.texts import Texts
from decodax.models.medusa_heads import MedusaShape

SHAPE = MedusaShape()

# Options of `decodax train medusa_joint`, too.
Labels = Annotated[str, typer.Option(help="What heads learn to predict: the model's tokens, or the text's.")]
Stride = Annotated[int, typer.Option(min=1, help="Learn from one position in this many; more saves memory.")]
SelfDistill = Annotated[
    int, typer.Option(min=0, help="Train on this many texts that the model writes itself, begun with pieces of yours.")
]


def chosen_texts(ready: Ready, self_distill: int) -> Texts:
    """The texts; with `self_distill`, that many of the model's own to train on, as long as a window, 256 at most."""
    if not self_distill:
        return ready.texts
    size = min(256, ready.plan.window_tokens)
    sizes = {"seed_tokens": max(1, size // 8), "new_tokens": size - max(1, size // 8)}
    with session.progress("letting the model write"):
        written = self_distilled(
            ready.lm, ready.texts.train, self_distill, **sizes, temperature=0.7, seed=ready.plan.seed
        )
    return replace(ready.texts, train=written)


def heads_summary(facts: dict[str, Any]) -> str:
    """How often each head's most probable token is right."""
    shares = ", ".join(f"{ranks[0]:.1%}" for ranks in facts["heldout"]["rank_accuracy"])
    return f"on held-out text the most probable token is the model's own {shares} of the time, head by head"


@training(summary=heads_summary, tokens=2_000_000, learning_rate=PLAN.peak, optimizer=PLAN.optimizer)
def medusa(
    ready: Ready,
    heads: Annotated[int, typer.Option(min=1, help="How many tokens ahead are predicted.")] = SHAPE.heads,
    blocks: Annotated[int, typer.Option(min=1, help="Residual blocks per head.")] = SHAPE.blocks,
    own_heads: Annotated[
        bool, typer.Option("--own-heads/--tied", help="An output matrix per head, or the model's own.")
    ] = not SHAPE.tied,
    labels: Labels = "model",
    stride: Stride = 1,
    self_distill: SelfDistill = 0,
) -> MedusaTraining:
    """Train Medusa heads, which predict several tokens ahead of a model, on your text.

    The model itself stays as it is; `decodax train medusa_joint` trains both on from here. The same command resumes an
    interrupted run.

    Example: decodax train medusa --model ./my-model --text ./my-code -o ./my-heads
    Then: decodax generate "Once" --model ./my-model --strategy medusa --draft ./my-heads
    """
    texts = chosen_texts(ready, self_distill)
    shape = MedusaShape(heads, blocks, not own_heads)
    return MedusaTraining(ready.lm, shape, ready.plan, texts, ready.run, labels, stride)
