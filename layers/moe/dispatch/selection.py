"""Selects the dispatch algorithm: the one that `Execution` asks for, or one for its devices and number of tokens."""

from decodax.layers.execution import Execution
from decodax.layers.moe.dispatch import METHODS
from decodax.layers.moe.dispatch._devices import mesh_axes
from decodax.layers.moe.dispatch.contract import ExpertDispatch

# Up to this many choices one all-reduce is used, beyond it two all-to-alls. An all-reduce moves 2 M D numbers per
# device, all-to-alls with twofold capacity 4 M X D / devices: with 8 devices and 8 experts per token as many as four
# all-reduces. All-to-alls do not save bytes, but split the computation around the layer, which matters in prefill only.
FEW_CHOICES = 1024


def select_dispatch(execution: Execution, num_choices: int) -> ExpertDispatch:
    """The algorithm that `execution` asks for, else one for its devices and `num_choices` (tokens x experts per token).

    Raises ValueError for a name that does not exist.
    """
    asked = execution.experts
    if isinstance(asked, str):
        if asked not in METHODS:
            raise ValueError(f"experts must be one of {', '.join(METHODS)}, or an object of theirs, got {asked!r}")
        return METHODS[asked]()
    if asked is not None:
        if not isinstance(asked, ExpertDispatch):
            raise ValueError(f"experts must be one of {', '.join(METHODS)}, or an object of theirs, got {asked!r}")
        return asked
    over = mesh_axes(execution, "E")
    if over is None:
        return METHODS["sorted"]()
    if num_choices <= FEW_CHOICES:
        return METHODS["gather_scatter"]()
    return METHODS["hierarchical" if isinstance(over, tuple) and len(over) == 2 else "all_to_all"]()
