"""Implements ALiBi: the scores of a head fall linearly with the distance between a query and a key.

Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation, arXiv 2108.12409. A number of
heads that is no power of two takes every second slope of the next power for the heads beyond the last power, as the
paper's code does.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32


@dataclass(frozen=True)
class Alibi:
    """The positions of a layer whose scores get slope x (position of the key - position of the query).

    max_bias: the last of N heads has the slope 2^-max_bias, where N is a power of two.
    scale: of all slopes (Falcon scales scores and biases alike).

    >>> Alibi().slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    >>> Alibi().slopes(3).tolist()
    [0.0625, 0.00390625, 0.25]
    """

    max_bias: float = 8.0
    scale: float = 1.0

    def slopes(self, num_heads: int) -> Float32[np.ndarray, " N"]:
        """The slope of each head."""
        lower = 2 ** math.floor(math.log2(num_heads))
        exponents = [self.max_bias * index / lower for index in range(1, lower + 1)]
        exponents += [self.max_bias * index / (2 * lower) for index in range(1, 2 * (num_heads - lower), 2)]
        return (self.scale * 2.0 ** -np.asarray(exponents)).astype(np.float32)
