"""`decodax train skip_decode` trains a LoRA adapter with which later tokens run fewer layers."""

from typing import Annotated, Any

import typer

from decodax.cli.train_command import training
from decodax.cli.train_options import Ready
from decodax.decoding.training.skip_decode import SkipDecodeShape, SkipDecodeTraining


def _summary(facts: dict[str, Any]) -> str:
    found = facts["heldout"]
    by_layers = ", ".join(f"{share:.1%} with {layers}" for layers, share in found["agreement_by_layers"])
    return (
        f"on held-out text, with layers falling, {found['greedy']:.1%} of the tokens are the model's own most "
        f"probable;\nby the number of layers: {by_layers}"
    )


@training(summary=_summary, tokens=2_000_000, learning_rate=0.002)
def skip_decode(
    ready: Ready,
    min_layers: Annotated[
        int | None, typer.Option(min=1, help="Layers that the last tokens run. Default: half the model's.")
    ] = None,
    max_layers: Annotated[int | None, typer.Option(min=1, help="Layers of the prompt. Default: all.")] = None,
    warmup: Annotated[
        int, typer.Option(min=0, help="How many of them are the model's first; the others, its last.")
    ] = 1,
    rank: Annotated[int, typer.Option(min=1, help="Of the change of every matrix.")] = 16,
) -> SkipDecodeTraining:
    """Train a model to run fewer layers the longer its text gets, on your text.

    The output is a LoRA adapter of the layers; the model itself stays as it is. The same command resumes an
    interrupted run; more or fewer --tokens move its end.

    Example: decodax train skip_decode --model ./my-model --text ./my-code -o ./my-change
    Then: decodax generate "Once" --model ./my-model --strategy skip_decode --draft ./my-change
    """
    least = min_layers or max(warmup + 1, ready.lm.config.num_layers // 2)
    shape = SkipDecodeShape(least, max_layers, warmup, rank)
    return SkipDecodeTraining(ready.lm, shape, ready.plan, ready.texts, ready.run)
