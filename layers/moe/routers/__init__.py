"""Lists the routers, which choose experts for tokens; one per file."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from decodax.core.lazy import Methods, exports

if TYPE_CHECKING:
    from decodax.layers.moe.routers.contract import Router as Router

_METHODS = Methods(
    __name__,
    {
        "top_k": "TopK",
        "expert_choice": "ExpertChoice",
    },
)
METHODS: "Mapping[str, type[Router]]" = _METHODS

__getattr__, __dir__ = exports(__name__, {"Router": "contract"})
