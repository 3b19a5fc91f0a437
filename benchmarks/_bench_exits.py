"""Measures what the head predicts after each layer on held-out text, for the embedded model and its LayerSkip change.

Logit lens: the final norm and the head are applied to the state after a layer, and the most probable token is compared
with the one that the same model finds after its last layer. Nothing is decoded and nothing is timed.
"""

from pathlib import Path
from typing import Any

from benchmarks import _bench_common as common
from benchmarks._bench_world import World
from decodax.decoding.auxiliary_weights import find_auxiliary_weights
from decodax.decoding.training.layer_skip import LayerSkipShape, LayerSkipTraining
from decodax.decoding.training.plan import Plan
from decodax.decoding.training.texts import Texts

UNCHANGED, TRAINED = "unchanged", "layer_skip"


def measure(world: World) -> dict[str, Any]:
    """`LayerSkipTraining.measure` of no change and of the shipped one, on the held-out windows.

    Raises SystemExit if the initial change, which is none, changes a token.
    """
    weights = find_auxiliary_weights("layer_skip", world.lm, None)
    # Only the target and the shape are read here: nothing is trained.
    training = LayerSkipTraining(world.lm, LayerSkipShape(**weights.shape), Plan(), Texts((), ()), Path())
    changes = {UNCHANGED: training.initial(), TRAINED: weights.params}
    found = {name: training.measure(change, world.heldout) for name, change in changes.items()}
    if found[UNCHANGED]["greedy"] != 1:
        raise SystemExit(
            f"the initial change must keep all tokens, got others at {1 - found[UNCHANGED]['greedy']:.2%} of positions"
        )
    report(found)
    return {"models": found}


def report(found: dict[str, dict[str, Any]]) -> None:
    shares = zip(*(facts["exit_agreement"] for facts in found.values()), strict=True)
    rows = [[layer, *both] for layer, both in enumerate(shares, start=1)]
    rows.append(["as unchanged", *(facts["greedy"] for facts in found.values())])
    common.print_table("Share of tokens at which an exit agrees with the last layer", ["after layer", *found], rows)
