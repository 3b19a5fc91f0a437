"""Decoding strategies as pure, jit-compiled loops over a frozen state."""

from decodax.decoding import drafters, verifiers
from decodax.decoding.autoregressive import autoregressive
from decodax.decoding.options import GenerateOptions
from decodax.decoding.sampling import Sampling
from decodax.decoding.speculative import Speculative, speculative
from decodax.decoding.state import DecodeState, init
from decodax.decoding.strategies import Speculation
from decodax.decoding.tree import Tree

__all__ = [
    "DecodeState",
    "GenerateOptions",
    "Sampling",
    "Speculation",
    "Speculative",
    "Tree",
    "autoregressive",
    "drafters",
    "init",
    "speculative",
    "verifiers",
]
