"""How deep a forward of the target goes: which layers run, for which rows and tokens; one way per file."""

from decodax.decoding.depth._contract import Depth, Reached
from decodax.decoding.depth._layers import run_layer
from decodax.decoding.depth.full import FullDepth

METHODS: dict[str, type[Depth]] = {"full": FullDepth}

__all__ = ["METHODS", "Depth", "FullDepth", "Reached", "run_layer"]
