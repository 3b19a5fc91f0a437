"""How a model and its state would lie on chips that need not exist: a mesh of seats, fitted to the model, and bytes.

Shapes come from the same descriptions and rules that `decodax.load` and decoding use, so bytes per chip are those that
the compiler counts; `tests/sharding/plan/test_compiled.py` compares them.
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

from decodax.decoding.sampling import Sampling
from decodax.decoding.state import DecodeState, _empty_state
from decodax.layers.execution import Execution
from decodax.layers.weight import Weight, named_weights
from decodax.models.config import BlockConfig, ModelConfig
from decodax.models.model import Model
from decodax.sharding import layout
from decodax.sharding.mesh import fit_mesh, mesh_text
from decodax.sharding.pipeline import ONE_CHUNK, find_stages
from decodax.sharding.rules import COPIES, MESH_AXES, RULES, Rules

SCALE_BYTES = 2  # of one bfloat16 scale for each output of a product whose weights are int8


@dataclass(frozen=True)
class Seat:
    """The place of a device in a mesh that is only planned."""

    id: int
    platform: str = "planned"
    device_kind: str = "planned"
    process_index: int = 0


@dataclass(frozen=True)
class Split:
    """A model split over `sizes` of the mesh axes; those that are 1 are left out, as in `decodax.load(mesh=)`."""

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
        """Those that one chip holds: all, or those of a pipeline's stage and those that all stages run.

        Raises ValueError if the layers make no such stages.
        """
        stages = self.degree("pipeline")
        if stages == 1:
            return self.layers
        blocks, dealt = self.config.blocks, find_stages(self.config.blocks, stages, ONE_CHUNK)
        return Counter(blocks[dealt.layers(place)[0]] for place in range(dealt.num_places))

    @cached_property
    def few_layers(self) -> ModelConfig:
        """The model with one layer of each kind."""
        return dataclasses.replace(self.config, blocks=tuple(self.layers))

    @cached_property
    def around_layers(self) -> dict[str, Any]:
        """Descriptions of the weights outside of the layers."""
        return dataclasses.replace(self.config, blocks=()).weights()

    @cached_property
    def mesh(self) -> Mesh:
        """Fitted to the model, with seats in place of devices."""
        names, shape = zip(*self.sizes, strict=True)
        seats = np.empty(math.prod(shape), object)
        seats[:] = [Seat(index) for index in range(len(seats))]
        kinds = (AxisType.Auto,) * len(names)
        return fit_mesh(Mesh(seats.reshape(shape), names, axis_types=kinds), self.few_layers)

    def axes_of(self, letter: str, count: int | None = None) -> tuple[str, ...]:
        """The axes of MESH_AXES over which `count` things of this letter are split."""
        names = self.rules.mesh_axes(self.mesh, letter, count)
        return tuple(dict.fromkeys("tensor" if name == COPIES else name for name in names if self.mesh.shape[name] > 1))

    def num_parts(self, letter: str, count: int | None = None) -> int:
        return math.prod(self.mesh.shape[name] for name in self.rules.mesh_axes(self.mesh, letter, count))

    def part_shape(self, weight: Weight, name: str) -> tuple[int, ...]:
        """What one chip holds of a weight. Raises ValueError, naming it, if it does not divide."""
        key = (weight, name)
        if key not in self._known_parts:
            self._known_parts[key] = self._part(self.rules.sharding(self.mesh, weight, name), weight.shape)
        return self._known_parts[key]

    @cached_property
    def _known_parts(self) -> dict[tuple[Weight, str], tuple[int, ...]]:
        """As every forward that is looked at asks for the same."""
        return {}

    def _part(self, sharding: NamedSharding, shape: tuple[int, ...]) -> tuple[int, ...]:
        axes = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
        names = [() if axis is None else (axis,) if isinstance(axis, str) else axis for axis in axes]
        parts = [math.prod(self.mesh.shape[name] for name in several) for several in names]
        return tuple(-(-size // count) for size, count in zip(shape, parts, strict=True))

    def state_bytes(self, state: Any) -> int:
        """What one chip holds of a state, given as arrays or shapes."""
        places = jax.tree.leaves(layout.shardings(state, self.mesh, self.rules))
        leaves = jax.tree.leaves(state)
        return sum(
            math.prod(self._part(place, leaf.shape)) * leaf.dtype.itemsize
            for place, leaf in zip(places, leaves, strict=True)
        )

    def decode_state_bytes(self, batch: int, capacity: int, dtype: DTypeLike) -> int:
        """What one chip holds of the state of `batch` rows with room for `capacity` tokens each."""
        state = abstract_state(self.few_layers, batch, capacity, jnp.dtype(dtype))
        held = (self.layers_of_a_chip[block] for block in self.layers)
        further = zip(state.caches, held, strict=True)
        return self.state_bytes(state) + sum((count - 1) * self.state_bytes(cache) for cache, count in further)

    def weight_bytes(self, weights: Mapping[str, Any], dtype: DTypeLike, *, int8: bool = False) -> int:
        """What one chip holds of these weights."""
        return sum(
            stored_bytes(self.part_shape(weight, name), name, weight, dtype, int8=int8)
            for name, weight in named_weights(weights)
        )


def stored_bytes(shape: tuple[int, ...], name: str, weight: Weight, dtype: DTypeLike, *, int8: bool) -> int:
    """Bytes of a part of a weight. `int8` is for the products of layers: not for the embedding, the head or a router.

    Each output of such a product has a scale.
    """
    count = math.prod(shape)
    if int8 and is_product(name, weight):
        outputs = count // shape[-1]
        return count + outputs * SCALE_BYTES
    return count * jnp.dtype(dtype).itemsize


def is_product(name: str, weight: Weight) -> bool:
    """Whether a weight is a matrix, or a stack of them, of a layer's product, and no router."""
    return len(weight.shape) >= 2 and not weight.replicated and weight.axes[0][0] not in "VXW" and "router" not in name


@lru_cache(maxsize=64)
def abstract_state(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> DecodeState:
    """The shapes of a state of greedy decoding: `batch` rows with room for `capacity` tokens each."""
    return state_of(Model(config, execution=Execution("xla")), batch, capacity, dtype)  # of which only shapes count


def state_of(model: Model, batch: int, capacity: int, dtype: jnp.dtype) -> DecodeState:
    """As `abstract_state`, of a model that may be over a mesh."""

    def start(sampling: Sampling) -> DecodeState:
        tokens, one = np.zeros((batch, capacity), np.int32), np.ones(batch, np.int32)
        stops = np.zeros((batch, 0), np.int32)
        return _empty_state(model, dtype, tokens, one, one, one.astype(np.uint32), stops, sampling)

    return jax.eval_shape(start, Sampling.create(batch, model.config.vocab_size))
