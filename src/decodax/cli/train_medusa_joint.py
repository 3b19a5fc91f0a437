"""`decodax train medusa_joint` trains Medusa heads further, together with a LoRA adapter of the model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from decodax.cli.train_command import training
from decodax.cli.train_medusa import Labels, SelfDistill, Stride, chosen_texts, heads_summary
from decodax.cli.train_options import PLAN, Ready
from decodax.decoding.auxiliary_weights import find_auxiliary_weights
from decodax.decoding.training.medusa_joint import MedusaJointShape, MedusaJointTraining


def _summary(facts: dict[str, Any]) -> str:
    unchanged = facts["heldout"]["unchanged"]
    return (
        f"{heads_summary(facts)}\nthe changed model's most probable token is the original's {unchanged:.1%} of the time"
    )


@training(summary=_summary, tokens=2_000_000, learning_rate=PLAN.peak, optimizer=PLAN.optimizer)
def medusa_joint(
    ready: Ready,
    heads: Annotated[Path, typer.Option(help="The folder that `decodax train medusa` wrote.")],
    rank: Annotated[int, typer.Option(min=1, help="Of the change of every matrix.")] = MedusaJointShape.rank,
    labels: Labels = "model",
    stride: Stride = 1,
    self_distill: SelfDistill = 0,
) -> MedusaJointTraining:
    """Train Medusa heads on, and the model with them, on your text (Medusa-2).

    The output is the heads and a LoRA adapter that makes the model easier to predict; what is decoded with them is
    the changed model's text. The same command resumes an interrupted run.

    Example: decodax train medusa_joint --model ./my-model --text ./my-code --heads ./my-heads -o ./my-joint
    Then: decodax generate "Once" --model ./my-model --strategy medusa --draft ./my-joint
    """
    start = find_auxiliary_weights("medusa", ready.lm, heads)
    sizes = (start.shape[name] for name in ("heads", "blocks", "tied"))
    shape = MedusaJointShape(*sizes, rank=rank)
    texts = chosen_texts(ready, self_distill)
    return MedusaJointTraining(ready.lm, shape, ready.plan, texts, ready.run, labels, stride, start=start)
