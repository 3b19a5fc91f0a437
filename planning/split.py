"""Computes how a mesh of simulated devices, which need not exist, splits a model and its state: bytes per chip.

Shapes come from the same descriptions and rules that `decodax.load` and decoding use, so bytes per chip are those that
the compiler counts; `tests/planning/test_compiled.py` compares them.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.typing import DTypeLike

from decodax.core.weight import Weight, named_weights
from decodax.decoding.sampling import Sampling
from decodax.decoding.state import DecodeState, empty_state
from decodax.layers.execution import Execution
from decodax.models.config import BlockConfig, ModelConfig
from decodax.models.key_value_copies import fit_mesh
from decodax.models.model import Model
from decodax.sharding import constraints
from decodax.sharding.mesh import mesh_text
from decodax.sharding.pipeline import ONE_CHUNK, find_stages
from decodax.sharding.rules import COPIES, MESH_AXES, RULES, Rules

SCALE_BYTES = 2  # one bfloat16 scale for each output of a product with int8 weights


@dataclass(frozen=True)
class SimulatedDevice:
    """A device of a mesh that is only planned; the fields are those of a JAX device."""

    id: int
    platform: str = "planned"
    device_kind: str = "planned"
    process_index: int = 0


@dataclass(frozen=True)
class Split:
    """A model split over a mesh.

    config: of the model.
    sizes: of the mesh axes, without those of size 1, as in `decodax.load(mesh=)`.
    rules: sharding rules.
    """

    config: ModelConfig
    sizes: tuple[tuple[str, int], ...]
    rules: Rules = RULES

    @classmethod
    def of(cls, config: ModelConfig, sizes: Mapping[str, int], rules: Rules = RULES) -> "Split":
        used = tuple((name, sizes[name]) for name in MESH_AXES if sizes.get(name, 1) > 1)
        return cls(config, used or (("data", 1),), rules)

    @property
    def text(self) -> str:
        """As `decodax.load(mesh=)` and `--mesh` take it."""
        return mesh_text(dict(self.sizes))

    def degree(self, axis: str) -> int:
        return dict(self.sizes).get(axis, 1)

    @cached_property
    def layers(self) -> Counter[BlockConfig]:
        """Each kind of layer, and how many there are."""
        return Counter(self.config.blocks)

    @cached_property
    def layers_of_a_chip(self) -> Counter[BlockConfig]:
        """The layers that one chip holds: all, or those of a pipeline stage and those outside the stages.

        Raises ValueError if the layers do not form such stages.
        """
        stages = self.degree("pipeline")
        if stages == 1:
            return self.layers
        blocks, found = self.config.blocks, find_stages(self.config.blocks, stages, ONE_CHUNK)
        return Counter(blocks[found.layers(place)[0]] for place in range(found.num_places))

    @cached_property
    def few_layers(self) -> ModelConfig:
        """The model with one layer of each kind."""
        return dataclasses.replace(self.config, blocks=tuple(self.layers))

    @cached_property
    def around_layers(self) -> dict[str, Any]:
        """Descriptions of the weights outside the layers."""
        return dataclasses.replace(self.config, blocks=()).weights()

    @cached_property
    def mesh(self) -> Mesh:
        """The mesh of simulated devices, fitted to the model."""
        names, shape = zip(*self.sizes, strict=True)
        simulated_devices = np.empty(math.prod(shape), object)
        simulated_devices[:] = [SimulatedDevice(index) for index in range(len(simulated_devices))]
        kinds = (AxisType.Auto,) * len(names)
        return fit_mesh(Mesh(simulated_devices.reshape(shape), names, axis_types=kinds), self.few_layers)

    def axes_of(self, axis_name: str, count: int | None = None) -> tuple[str, ...]:
        """The axes of MESH_AXES over which `count` items of this logical axis are split."""
        names = self.rules.mesh_axes(self.mesh, axis_name, count)
        return tuple(dict.fromkeys("tensor" if name == COPIES else name for name in names if self.mesh.shape[name] > 1))

    def num_shards(self, axis_name: str, count: int | None = None) -> int:
        return math.prod(self.mesh.shape[name] for name in self.rules.mesh_axes(self.mesh, axis_name, count))

    def shard_shape(self, weight: Weight, name: str) -> tuple[int, ...]:
        """The shape of a weight's shard on one chip. Raises ValueError, naming it, if it does not divide."""
        key = (weight, name)
        if key not in self._shard_shapes:
            self._shard_shapes[key] = self._shard_shape(self.rules.sharding(self.mesh, weight, name), weight.shape)
        return self._shard_shapes[key]

    @cached_property
    def _shard_shapes(self) -> dict[tuple[Weight, str], tuple[int, ...]]:
        """A cache, as every forward needs the same shapes."""
        return {}

    def _shard_shape(self, sharding: NamedSharding, shape: tuple[int, ...]) -> tuple[int, ...]:
        axes = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
        names = [() if axis is None else (axis,) if isinstance(axis, str) else axis for axis in axes]
        shards = [math.prod(self.mesh.shape[name] for name in several) for several in names]
        return tuple(-(-size // count) for size, count in zip(shape, shards, strict=True))

    def state_bytes(self, state: Any) -> int:
        """Bytes of a state, given as arrays or shapes, on one chip."""
        shardings = jax.tree.leaves(constraints.shardings(state, self.mesh, self.rules))
        leaves = jax.tree.leaves(state)
        return sum(
            math.prod(self._shard_shape(sharding, leaf.shape)) * leaf.dtype.itemsize
            for sharding, leaf in zip(shardings, leaves, strict=True)
        )

    def decode_state_bytes(self, batch: int, capacity: int, dtype: DTypeLike) -> int:
        """Bytes of the state of `batch` rows with capacity for `capacity` tokens each, on one chip."""
        state = abstract_state(self.few_layers, batch, capacity, jnp.dtype(dtype))
        held = (self.layers_of_a_chip[block] for block in self.layers)
        further = zip(state.caches, held, strict=True)
        return self.state_bytes(state) + sum((count - 1) * self.state_bytes(cache) for cache, count in further)

    def weight_bytes(self, weights: Mapping[str, Any], dtype: DTypeLike, *, int8: bool = False) -> int:
        """Bytes of these weights on one chip."""
        return sum(
            stored_bytes(self.shard_shape(weight, name), name, weight, dtype, int8=int8)
            for name, weight in named_weights(weights)
        )


def stored_bytes(shape: tuple[int, ...], name: str, weight: Weight, dtype: DTypeLike, *, int8: bool) -> int:
    """Bytes of a weight's shard.

    shape: of the shard.
    name: of the weight.
    weight: its description.
    dtype: of weights that are not int8.
    int8: whether products of layers (not the embedding, the head or a router) are int8, with a scale for each output.
    """
    count = math.prod(shape)
    if int8 and is_product(name, weight):
        outputs = count // shape[-1]
        return count + outputs * SCALE_BYTES
    return count * jnp.dtype(dtype).itemsize


def is_product(name: str, weight: Weight) -> bool:
    """Whether a weight is a matrix of a layer's product, or a stack of them, and not a router."""
    return len(weight.shape) >= 2 and not weight.replicated and weight.axes[0][0] not in "VXW" and "router" not in name


@lru_cache(maxsize=64)
def abstract_state(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> DecodeState:
    """The shapes of a state of greedy decoding.

    config: of the model.
    batch: rows.
    capacity: tokens of each row.
    dtype: of the caches.
    """
    return state_of(Model(config, execution=Execution("xla")), batch, capacity, dtype)  # only its shapes are used


def state_of(model: Model, batch: int, capacity: int, dtype: jnp.dtype) -> DecodeState:
    """As `abstract_state`, for a model that may be on a mesh."""

    def start(sampling: Sampling) -> DecodeState:
        tokens, one = np.zeros((batch, capacity), np.int32), np.ones(batch, np.int32)
        stops = np.zeros((batch, 0), np.int32)
        return empty_state(model, dtype, tokens, one, one, one.astype(np.uint32), stops, sampling)

    return jax.eval_shape(start, Sampling.create(batch, model.config.vocab_size))
