"""Lists the expert dispatch algorithms, which bring tokens to experts; they differ in their communication."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from decodax.core.lazy import Methods, exports

if TYPE_CHECKING:
    from decodax.layers.moe.dispatch.contract import ExpertDispatch as ExpertDispatch
    from decodax.layers.moe.dispatch.contract import Setting as Setting

_METHODS = Methods(
    __name__,
    {
        "dense": "Dense",
        "sorted": "Sorted",
        "all_to_all": "AllToAll",
        "hierarchical": "Hierarchical",
        "gather_scatter": "GatherScatter",
        "sliced": "Sliced",
    },
)
METHODS: "Mapping[str, type[ExpertDispatch]]" = _METHODS

__getattr__, __dir__ = exports(__name__, {"Setting": "contract", "ExpertDispatch": "contract"})
