"""What one forward asks of a chip: tokens, parts with their arithmetic and bytes, collectives."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax.numpy as jnp

from decodax.layers.weight import named_weights
from decodax.sharding.plan.network import Kind
from decodax.sharding.plan.split import Split, stored_bytes

Stored = Literal["same", "int8"]


@dataclass(frozen=True)
class Tokens:
    """B rows, each with T new tokens behind S cached ones. dtype: of weights, caches and what is between layers.

    weights, cache: "int8" stores those of layers' products, or all that is cached, in a byte each; what is computed is
    computed in `dtype`.
    """

    rows: int
    new: int
    cached: int
    dtype: str = "bfloat16"
    weights: Stored = "same"
    cache: Stored = "same"

    @property
    def item_bytes(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    @property
    def cache_dtype(self) -> str:
        return self.dtype if self.cache == "same" else "float8_e4m3fn"  # as many bytes; caches are declared as floats


@dataclass(frozen=True)
class Collective:
    """One transfer among the devices along mesh axes; num_bytes as `network.py` counts them."""

    kind: Kind
    axes: tuple[str, ...]
    num_bytes: float


@dataclass(frozen=True)
class Part:
    """What runs one after the other on a chip, `count` times. Bytes are read from or written to its memory.

    fetched_ahead: whether it is known beforehand which weights it reads.
    """

    name: str
    count: int
    flops: float
    weight_bytes: float
    cache_bytes: float
    activation_bytes: float
    collectives: tuple[Collective, ...]
    fetched_ahead: bool = True


@dataclass(frozen=True)
class Shape:
    """How a forward's tokens are dealt out."""

    split: Split
    tokens: Tokens

    @cached_property
    def rows(self) -> int:
        return self.tokens.rows // self.split.num_parts("B", self.tokens.rows)

    @cached_property
    def new(self) -> int:
        """New tokens of a row on one device; a decoding step has one, and every device has it."""
        return self.tokens.new // self.split.num_parts("T", self.tokens.new)

    @property
    def num_tokens(self) -> int:
        return self.rows * self.new

    @cached_property
    def hidden_bytes(self) -> float:
        """Of the hidden states of one device's tokens."""
        return self.num_tokens * self.split.config.hidden_size * self.tokens.item_bytes

    def products(self, weights: Any, num_tokens: float) -> tuple[float, float, float]:
        """FLOPs, bytes of weights and bytes of activations of a device's products with `num_tokens` tokens each."""
        flops = weight_bytes = activation_bytes = 0.0
        for name, weight in named_weights(weights):
            part = self.split.part_shape(weight, name)
            weight_bytes += stored_bytes(part, name, weight, self.tokens.dtype, int8=self.tokens.weights == "int8")
            if len(part) == 2:
                flops += 2 * math.prod(part) * num_tokens
                activation_bytes += sum(part) * num_tokens * self.tokens.item_bytes
        return flops, weight_bytes, activation_bytes

    def sums(self, letter: str) -> Iterator[Collective]:
        """The sum behind a product whose inputs are split by this letter."""
        axes = self.split.axes_of(letter)
        if axes:
            yield Collective("all-reduce", axes, self.hidden_bytes)
