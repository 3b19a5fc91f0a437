"""Describes a workload, and computes the bytes of its weights, cache and temporaries on a chip."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from decodax.core.weight import named_weights
from decodax.decoding.chunked_prefill import MAX_CHUNK_TOKENS
from decodax.decoding.sizes import cache_capacity
from decodax.layers.execution import Execution
from decodax.layers.moe.layer import MoEConfig
from decodax.planning.mixture import room_for_choices
from decodax.planning.split import Split
from decodax.planning.topology import Topology
from decodax.planning.work import Stored, Tokens

_MOST_ROWS = 2**18  # each row is described alone: the description of 10**12 rows fills the memory


@dataclass(frozen=True)
class Workload:
    """What is to run.

    batch: rows at once.
    context: tokens of each row, prompt and output.
    dtype, weights, cache: as in `Tokens`.
    """

    batch: int
    context: int
    dtype: str = "bfloat16"
    weights: Stored = "same"
    cache: Stored = "same"

    def __post_init__(self) -> None:
        if self.batch < 1 or self.context < 2:
            raise ValueError(f"a plan needs at least 1 row of 2 tokens, got {self.batch} rows of {self.context}")
        if self.batch > _MOST_ROWS:
            raise ValueError(f"batch must be at most {_MOST_ROWS:,} rows, got {self.batch:,}")

    @property
    def capacity(self) -> int:
        """Slots of each row's cache: a size that kernels support."""
        return cache_capacity(self.context, Execution("tpu"))

    @property
    def cache_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.tokens(1, 0).cache_dtype)

    def tokens(self, new: int, cached: int, rows: int | None = None) -> Tokens:
        return Tokens(self.batch if rows is None else rows, new, cached, self.dtype, self.weights, self.cache)


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest chip.

    weights: of the model.
    cache: the state of decoding.
    temporaries: of a prefill chunk, an estimate; compiling gives the exact number.
    usable: what a program may use.
    """

    weights: int
    cache: int
    temporaries: int
    usable: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.temporaries

    @property
    def free(self) -> int:
        return self.usable - self.total


def memory_of(split: Split, topology: Topology, workload: Workload) -> Memory:
    """The memory of a chip: the weights of its stage, the state of decoding, and the temporaries of a prefill chunk."""
    config, int8 = split.config, workload.weights == "int8"

    def held(weights: dict[str, Any]) -> int:
        return split.weight_bytes(weights, workload.dtype, int8=int8)

    held_layers = split.layers_of_a_chip.items()
    layers = sum(count * held(block.weights(config.hidden_size)) for block, count in held_layers)
    weights = layers + held(split.around_layers)
    cache = split.decode_state_bytes(workload.batch, workload.capacity, workload.cache_dtype)
    return Memory(weights, cache, _temporaries(split, workload), topology.chip.usable_bytes)


def _temporaries(split: Split, workload: Workload) -> int:
    """An estimate, from above, of what a chunk of a prompt or a step needs beside weights and state.

    A chunk: three times its hidden states, and the products of the widest layer that are alive at once. A step: its
    logits twice. Compiled programs need two thirds of it to all from 150 MiB on; of less, much stays in VMEM.
    """
    config, item = split.config, jnp.dtype(workload.dtype).itemsize
    chunk = min(MAX_CHUNK_TOKENS, workload.context)
    rows = workload.batch // split.num_shards("B", workload.batch)
    tokens = rows * chunk // split.num_shards("T", chunk)
    widest = 0
    for block in split.layers:
        weights = block.weights(config.hidden_size)
        for half in ("mixer", "feed_forward"):
            widest = max(widest, tokens * _num_outputs(split, weights[half], num_axes=2))
        if isinstance(block.feed_forward_layer, MoEConfig):
            choices = room_for_choices(split, block.feed_forward_layer, workload.tokens(chunk, 0))
            inner = _num_outputs(split, weights["feed_forward"]["experts"], num_axes=3)
            widest = max(widest, choices * (3 * config.hidden_size + inner))  # sent, received, returned
    logits = rows * config.vocab_size // split.num_shards("V") * 4
    return max((widest + 3 * tokens * config.hidden_size) * item, 2 * logits)


def _num_outputs(split: Split, weights: dict[str, Any], num_axes: int) -> int:
    """Outputs, on a chip, of the matrices of a layer that do not return to the hidden size."""
    named = [(name, weight) for name, weight in named_weights(weights) if len(weight.shape) == num_axes]
    return sum(split.shard_shape(weight, name)[-2] for name, weight in named if weight.axes[-2] != "D")
