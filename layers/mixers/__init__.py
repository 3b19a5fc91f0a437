"""Layers that let tokens exchange information, with their own weights and cache."""

from decodax.layers.mixers._contract import Mixer
from decodax.layers.mixers.cca import CCAConfig
from decodax.layers.mixers.gated_delta import GatedDeltaConfig
from decodax.layers.mixers.gated_linear import GatedLinearConfig
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.mixers.lightning import LightningConfig
from decodax.layers.mixers.mfa import MFAConfig
from decodax.layers.mixers.mla import MLAConfig

METHODS: dict[str, type[Mixer]] = {
    "gqa": GQAConfig,
    "mla": MLAConfig,
    "mfa": MFAConfig,
    "cca": CCAConfig,
    "gated_linear": GatedLinearConfig,
    "lightning": LightningConfig,
    "gated_delta": GatedDeltaConfig,
}

__all__ = ["METHODS", "Mixer"]
