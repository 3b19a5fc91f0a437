"""Ways to run the experts that tokens chose: they differ in what moves between devices, and not in the result."""

from decodax.layers.execution import Execution
from decodax.layers.moe.experts._contract import Setting, WayToRun
from decodax.layers.moe.experts._devices import mesh_axes
from decodax.layers.moe.experts.all_to_all import AllToAll
from decodax.layers.moe.experts.dense import Dense
from decodax.layers.moe.experts.gather_scatter import GatherScatter
from decodax.layers.moe.experts.hierarchical import Hierarchical
from decodax.layers.moe.experts.sliced import Sliced
from decodax.layers.moe.experts.sorted import Sorted

METHODS: dict[str, type[WayToRun]] = {
    "dense": Dense,
    "sorted": Sorted,
    "all_to_all": AllToAll,
    "hierarchical": Hierarchical,
    "gather_scatter": GatherScatter,
    "sliced": Sliced,
}

# Up to here one sum over devices is taken, beyond two exchanges. A sum moves 2 M D numbers per device, exchanges with
# twofold room 4 M X D / devices: with 8 devices and 8 experts per token as many as four sums, so it is not the bytes
# but the computation around the layer, shared out by an exchange, that speaks for it, and that matters in prompts only.
FEW_CHOICES = 1024


def choose_way(execution: Execution, num_choices: int) -> WayToRun:
    """What `execution` asks for, or else what suits its devices and so many choices (tokens x experts per token).

    Raises ValueError for a name that does not exist.
    """
    asked = execution.experts
    if isinstance(asked, str):
        if asked not in METHODS:
            raise ValueError(f"experts must be one of {', '.join(METHODS)}, or an object of theirs, got {asked!r}")
        return METHODS[asked]()
    if asked is not None:
        if not isinstance(asked, WayToRun):
            raise ValueError(f"experts must be one of {', '.join(METHODS)}, or an object of theirs, got {asked!r}")
        return asked
    over = mesh_axes(execution, "E")
    if over is None:
        return Sorted()
    if num_choices <= FEW_CHOICES:
        return GatherScatter()
    return Hierarchical() if len(over) == 2 and not isinstance(over, str) else AllToAll()


__all__ = ["METHODS", "Setting", "WayToRun", "choose_way"]
