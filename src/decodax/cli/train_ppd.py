"""`decodax train ppd` trains prompt tokens for parallel prompt decoding."""

from typing import Annotated, Any

import typer

from decodax.cli.train_command import training
from decodax.cli.train_options import Ready
from decodax.decoding.training.prompt_tokens import PromptTokensShape, PromptTokensTraining


def _summary(facts: dict[str, Any]) -> str:
    shares = ", ".join(f"{ranks[0]:.1%}" for ranks in facts["heldout"]["rank_accuracy"])
    return f"on held-out text the most probable token is the model's own {shares} of the time, distance by distance"


@training(summary=_summary, tokens=2_000_000, learning_rate=0.05)
def ppd(
    ready: Ready,
    distances: Annotated[int, typer.Option(min=1, help="How many tokens ahead are predicted.")] = 3,
    ensemble: Annotated[int, typer.Option(min=1, help="Embeddings per distance, whose logits are averaged.")] = 1,
) -> PromptTokensTraining:
    """Train prompt tokens, with which a model predicts several tokens ahead of itself, on your text.

    The model itself stays as it is. The same command resumes an interrupted run; more or fewer --tokens move its end.

    Example: decodax train ppd --model ./my-model --text ./my-code -o ./my-prompts
    Then: decodax generate "Once" --model ./my-model --strategy ppd --draft ./my-prompts
    """
    shape = PromptTokensShape(distances, ensemble)
    return PromptTokensTraining(ready.lm, shape, ready.plan, ready.texts, ready.run)
