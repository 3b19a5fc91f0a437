"""How deep a forward of the target goes: which layers run, for which rows and tokens; one way per file."""

from decodax.decoding.depth._contract import Depth, Reached
from decodax.decoding.depth._layers import run_layer
from decodax.decoding.depth.full import FullDepth
from decodax.decoding.depth.routed_layers import RoutedLayers
from decodax.decoding.depth.skip_decode import SkipDecode
from decodax.decoding.depth.speculative_exit import SpeculativeExit

METHODS: dict[str, type[Depth]] = {
    "full": FullDepth,
    "speculative_exit": SpeculativeExit,
    "skip_decode": SkipDecode,
    "routed_layers": RoutedLayers,
}

__all__ = ["METHODS", "Depth", "FullDepth", "Reached", "RoutedLayers", "SkipDecode", "SpeculativeExit", "run_layer"]
