"""Decoding strategies as pure, jit-compiled loops over a frozen state."""

from decodax.decoding.autoregressive import autoregressive
from decodax.decoding.options import GenerateOptions
from decodax.decoding.sampling import Sampling
from decodax.decoding.state import DecodeState, init

__all__ = ["DecodeState", "GenerateOptions", "Sampling", "autoregressive", "init"]
