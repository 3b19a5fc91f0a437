"""What the head says after each layer, on held-out text: the embedded model as it is, and taught to exit early.

Logit lens: the final norm and the head are applied to the state after a layer, and the likeliest token is compared with
the one that the same model finds after its last layer. Nothing is decoded and nothing is timed.
"""

from pathlib import Path
from typing import Any

from decodax.decoding.trained_part import find_part
from decodax.decoding.training.layer_skip import LayerSkipShape, LayerSkipTraining
from decodax.decoding.training.plan import Plan
from decodax.decoding.training.texts import Texts
from decodax.scripts import _bench_common as common
from decodax.scripts._bench_world import World

UNCHANGED, TAUGHT = "unchanged", "layer_skip"


def measure(world: World) -> dict[str, Any]:
    """`LayerSkipTraining.measure` of no change and of the shipped one, on the held-out windows.

    Raises SystemExit if the part that changes nothing changes a token.
    """
    part = find_part("layer_skip", world.lm, None)
    # Only the target and the shape are read here: nothing is trained.
    training = LayerSkipTraining(world.lm, LayerSkipShape(**part.shape), Plan(), Texts((), ()), Path())
    changes = {UNCHANGED: training.initial(), TAUGHT: part.params}
    found = {name: training.measure(change, world.heldout) for name, change in changes.items()}
    if found[UNCHANGED]["greedy"] != 1:
        raise SystemExit(
            f"a change of nothing gives other tokens at {1 - found[UNCHANGED]['greedy']:.2%} of the places"
        )
    report(found)
    return {"models": found}


def report(found: dict[str, dict[str, Any]]) -> None:
    shares = zip(*(facts["exit_agreement"] for facts in found.values()), strict=True)
    rows = [[layer, *both] for layer, both in enumerate(shares, start=1)]
    rows.append(["as unchanged", *(facts["greedy"] for facts in found.values())])
    common.print_table("Share of tokens that an exit finds as the last layer does", ["after layer", *found], rows)
