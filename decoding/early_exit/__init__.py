"""Lists the layer policies: which layers of the target run, for which rows and tokens; one per file."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from decodax.core.lazy import Methods, exports

if TYPE_CHECKING:
    from decodax.decoding.early_exit.all_layers import AllLayers as AllLayers
    from decodax.decoding.early_exit.conditional_layer import run_layer as run_layer
    from decodax.decoding.early_exit.contract import LayerPolicy as LayerPolicy
    from decodax.decoding.early_exit.contract import TargetForward as TargetForward
    from decodax.decoding.early_exit.routed_layers import RoutedLayers as RoutedLayers
    from decodax.decoding.early_exit.skip_decode import SkipDecode as SkipDecode
    from decodax.decoding.early_exit.speculative_exit import SpeculativeExit as SpeculativeExit

_METHODS = Methods(
    __name__,
    {
        "all_layers": "AllLayers",
        "speculative_exit": "SpeculativeExit",
        "skip_decode": "SkipDecode",
        "routed_layers": "RoutedLayers",
    },
)
METHODS: "Mapping[str, type[LayerPolicy]]" = _METHODS

__getattr__, __dir__ = exports(
    __name__,
    _METHODS.exports | {"run_layer": "conditional_layer", "LayerPolicy": "contract", "TargetForward": "contract"},
)
