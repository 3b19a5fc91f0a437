"""`decodax train layer_skip` trains a LoRA adapter of a model with which its first layers can draft for it."""

from typing import Annotated, Any

import typer

from decodax.cli.train_command import training
from decodax.cli.train_options import PLAN, Ready
from decodax.decoding.training.layer_skip import LayerSkipShape, LayerSkipTraining

SHAPE = LayerSkipShape()


def _summary(facts: dict[str, Any]) -> str:
    found, best = facts["heldout"], facts["best"]
    agreement = ", ".join(f"{share:.1%}" for share in found["exit_agreement"])
    return (
        f"on {found['tokens']:,} held-out tokens the changed model has the model's most probable token at "
        f"{found['greedy']:.1%} of the positions;\nits exits predict its own at {agreement}. "
        f"{best['draft_tokens']} draft tokens after {best['exit_layer']} layers: about "
        f"{best['tokens_per_full_forward']:.2f} tokens for as many layers as one forward runs"
    )


@training(summary=_summary, tokens=2_000_000, learning_rate=3e-3, optimizer=PLAN.optimizer)
def layer_skip(
    ready: Ready,
    rank: Annotated[int, typer.Option(min=1, help="Of the change of every matrix.")] = SHAPE.rank,
    max_dropout: Annotated[
        float, typer.Option(min=0, max=1, help="Chance that a row skips the last layer; less for those before.")
    ] = SHAPE.max_dropout,
    exit_scale: Annotated[float, typer.Option(help="Weight of the early exits; the last one's is 1.")] = (
        SHAPE.exit_scale
    ),
    exit_power: Annotated[
        float, typer.Option(min=0, help="0: all early exits weigh the same; more: the first ones less.")
    ] = SHAPE.exit_power,
    exit_share: Annotated[
        float, typer.Option(help="Exits are trained after up to this share of the layers.")
    ] = SHAPE.exit_share,
    exits_per_step: Annotated[int, typer.Option(min=1, help="Early exits that a step trains.")] = SHAPE.exits_per_step,
) -> LayerSkipTraining:
    """Teach a model to exit early, on your text, so that its own first layers can draft for it.

    The output is a LoRA adapter of the weights, with its measures in auxiliary.json and the loss curve in loss.png.
    The changed model is another model; decode with it by `--adapter` and the strategies layer_skip and del.

    Example: decodax train layer_skip --model ./my-model --text ./my-code -o ./my-change, then decodax generate --model
    ./my-model --adapter ./my-change --strategy del "def fibonacci(n):"
    """
    shape = LayerSkipShape(rank, max_dropout, exit_scale, exit_power, exit_share, exits_per_step)
    return LayerSkipTraining(ready.lm, shape, ready.plan, ready.texts, ready.run)
