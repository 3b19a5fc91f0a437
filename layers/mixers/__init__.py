"""Lists the mixers, one per file: attention and recurrent layers, with their own weights and cache."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from decodax.core.lazy import Methods, exports

if TYPE_CHECKING:
    from decodax.layers.mixers.contract import Mixer as Mixer

_METHODS = Methods(
    __name__,
    {
        "gqa": "GQAConfig",
        "mla": "MLAConfig",
        "mfa": "MFAConfig",
        "cca": "CCAConfig",
        "gated_linear": "GatedLinearConfig",
        "lightning": "LightningConfig",
        "gated_delta": "GatedDeltaConfig",
        "short_convolution": "ShortConvolutionConfig",
    },
)
METHODS: "Mapping[str, type[Mixer]]" = _METHODS

__getattr__, __dir__ = exports(__name__, {"Mixer": "contract"})
