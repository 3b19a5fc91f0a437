"""Layers that let tokens exchange information, with their own weights and cache."""

from decodax.layers.mixers._contract import Mixer
from decodax.layers.mixers.gqa import GQAConfig

METHODS: dict[str, type[Mixer]] = {"gqa": GQAConfig}

__all__ = ["METHODS", "Mixer"]
