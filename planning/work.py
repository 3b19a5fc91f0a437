"""Describes the work of a forward on a chip: tokens, cost items with their arithmetic and bytes, collectives."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax.numpy as jnp

from decodax.core.weight import named_weights
from decodax.planning.network import Kind
from decodax.planning.split import Split, stored_bytes

Stored = Literal["same", "int8"]


@dataclass(frozen=True)
class Tokens:
    """The tokens of a forward.

    rows: B.
    new: T, new tokens in each row.
    cached: S, cached tokens before them in each row.
    dtype: of weights, caches and hidden states, and of all computation.
    weights: "int8" stores the weights of layers' products in a byte each.
    cache: "int8" stores all cached numbers in a byte each.
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
    """One collective.

    kind: of collective.
    axes: of the mesh.
    num_bytes: as `network.py` counts them.
    """

    kind: Kind
    axes: tuple[str, ...]
    num_bytes: float


@dataclass(frozen=True)
class CostItem:
    """Operations that run one after the other on a chip. Bytes are read from or written to its memory.

    name: for reports.
    count: how many times they run.
    flops, weight_bytes, cache_bytes, activation_bytes: of one time.
    collectives: of one time.
    fetched_ahead: whether weights can be prefetched, as it is known beforehand which are read.
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
    """How a forward's tokens are split.

    split: of the model.
    tokens: of the forward.
    """

    split: Split
    tokens: Tokens

    @cached_property
    def rows(self) -> int:
        return self.tokens.rows // self.split.num_shards("B", self.tokens.rows)

    @cached_property
    def new(self) -> int:
        """New tokens of a row on one device; every device has the single token of a decoding step."""
        return self.tokens.new // self.split.num_shards("T", self.tokens.new)

    @property
    def num_tokens(self) -> int:
        return self.rows * self.new

    @cached_property
    def hidden_bytes(self) -> float:
        """Bytes of the hidden states of one device's tokens."""
        return self.num_tokens * self.split.config.hidden_size * self.tokens.item_bytes

    def products(self, weights: Any, num_tokens: float) -> tuple[float, float, float]:
        """FLOPs, bytes of weights and bytes of activations of a device's products with `num_tokens` tokens."""
        flops = weight_bytes = activation_bytes = 0.0
        for name, weight in named_weights(weights):
            shard = self.split.shard_shape(weight, name)
            weight_bytes += stored_bytes(shard, name, weight, self.tokens.dtype, int8=self.tokens.weights == "int8")
            if len(shard) == 2:
                flops += 2 * math.prod(shard) * num_tokens
                activation_bytes += sum(shard) * num_tokens * self.tokens.item_bytes
        return flops, weight_bytes, activation_bytes

    def all_reduces(self, axis_name: str) -> Iterator[Collective]:
        """The all-reduce after a product whose inputs are split by this logical axis; none if they are not split."""
        axes = self.split.axes_of(axis_name)
        if axes:
            yield Collective("all-reduce", axes, self.hidden_bytes)
