"""Compiles a plan for TPUs that need not exist: the decoding loop of `autoregressive.py`, and a chunk of a prefill.

libtpu compiles for any slice on any x86-64 Linux. The programs are those that run: `Model.apply`, argmax and commit,
with the weights and the state as shapes with the shardings of `decodax.load` and of decoding, and with the kernels that
a model takes which is loaded there.

A prefill chunk takes XLA about ten seconds a layer, so only one layer of each kind is compiled, and the last layer,
whose output is not used. Its collectives are multiplied by the number of layers of the kind. A pipeline is compiled
completely: a stage has few layers, and its collectives are in the loop over micro-batches and are listed once.
"""

import dataclasses
import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from decodax.core.weight import Weight
from decodax.decoding.autoregressive import autoregressive
from decodax.decoding.chunked_prefill import MAX_CHUNK_TOKENS, prefill_chunk
from decodax.kernels_pallas.selection import compiled_for
from decodax.layers.execution import Execution
from decodax.models.config import ModelConfig
from decodax.models.key_value_copies import fit_mesh
from decodax.models.model import Model
from decodax.planning.hlo import ProgramCollective, collectives_of
from decodax.planning.search import DoesNotFitError, Plan
from decodax.planning.split import state_of
from decodax.sharding import constraints
from decodax.sharding.mesh import read_mesh
from decodax.sharding.topologies import tpu_devices


@dataclass(frozen=True)
class Program:
    """A compiled program, per chip.

    what: its name.
    num_layers: layers that were compiled.
    of_layers: layers of the model.
    weight_bytes: of the weight arguments, from their shapes and shardings.
    state_bytes: of the state arguments, from their shapes and shardings.
    argument_bytes: as the compiler counts them.
    temporary_bytes: as the compiler counts them.
    output_bytes: as the compiler counts them, without outputs in donated buffers.
    code_bytes: as the compiler counts them.
    flops: XLA's count of one step.
    accessed_bytes: XLA's count of one step, in every memory, so a weight prefetched into VMEM counts three times.
    collectives: (collective, how many times) in one step.
    seconds: to compile.
    """

    what: str
    num_layers: int
    of_layers: int
    weight_bytes: int
    state_bytes: int
    argument_bytes: int
    temporary_bytes: int
    output_bytes: int
    code_bytes: int
    flops: float
    accessed_bytes: float
    collectives: tuple[tuple[ProgramCollective, int], ...]
    seconds: float

    @property
    def total_bytes(self) -> int:
        return self.argument_bytes + self.temporary_bytes + self.output_bytes + self.code_bytes


def cannot_compile(plan: Plan) -> str | None:
    """Why this plan cannot be compiled, None if it can."""
    if not plan.topology.chip.is_tpu:
        return f"{plan.topology.chip.title}: nothing here compiles for GPUs that are not there"
    if plan.workload.weights != "same" or plan.workload.cache != "same":
        return f"decodax computes with weights and caches in {plan.workload.dtype}: int8 is in the cost model alone"
    return None


def compile_step(plan: Plan) -> Program:
    """The decoding loop.

    Raises ModuleNotFoundError without libtpu.
    Raises `DoesNotFitError` if the compiler finds no room.
    """
    with compiled_for("tpu"):
        model, params, state = _abstract(plan, plan.split.config)
        lower = jax.jit(autoregressive(model), donate_argnums=1).lower
        return _compile("decoding step", plan, plan.split.config, lower, (params, state), params, state)


def compile_prompt(plan: Plan) -> Program:
    """A prefill chunk, through one layer of each kind and the last one. Raises as `compile_step`."""
    config = plan.split.config
    kinds = tuple(dict.fromkeys(config.blocks))
    cut = plan.split.degree("pipeline") == 1 and len(kinds) < config.num_layers
    few = dataclasses.replace(config, blocks=(*kinds, config.blocks[-1])) if cut else config
    chunk = min(MAX_CHUNK_TOKENS, plan.workload.context)
    with compiled_for("tpu"):
        model, params, state = _abstract(plan, few)
        start = jax.ShapeDtypeStruct((), jnp.int32)
        arguments = (model, None, chunk, params, state, start)
        return _compile("prompt chunk", plan, few, prefill_chunk.lower, arguments, params, state)


def _abstract(plan: Plan, config: ModelConfig) -> tuple[Model, Any, Any]:
    """The model on the topology's chips, its parameters and a state, as shapes with their shardings."""
    rules = plan.split.rules
    mesh = fit_mesh(read_mesh(plan.split.text, tpu_devices(plan.topology.name)), config)
    model = Model(config, execution=Execution(mesh=mesh, rules=rules))
    dtype = jnp.dtype(plan.workload.dtype)

    def weight(described: Weight) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(described.shape, dtype, sharding=rules.sharding(mesh, described, "weight"))

    params = jax.tree.map(weight, model.weights(), is_leaf=lambda leaf: isinstance(leaf, Weight))
    state = state_of(model, plan.workload.batch, plan.workload.capacity, dtype)
    shardings = constraints.shardings(state, mesh, rules)
    sharded = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings
    )
    return model, params, sharded


def _compile(
    what: str, plan: Plan, config: ModelConfig, lower: Any, arguments: Any, params: Any, state: Any
) -> Program:
    begin = time.monotonic()
    try:
        compiled = lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(f"{plan.split.text}: the compiler finds no room for the {what}: {error}") from error
    seconds = time.monotonic() - begin
    memory, counted = compiled.memory_analysis(), compiled.cost_analysis()
    found = collectives_of(compiled.as_text())
    return Program(
        what=what,
        num_layers=config.num_layers,
        of_layers=plan.split.config.num_layers,
        weight_bytes=_bytes_per_chip(params),
        state_bytes=_bytes_per_chip(state),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        flops=counted["flops"],
        accessed_bytes=counted["bytes accessed"],
        collectives=_counted(found, config, plan.split.config),
        seconds=seconds,
    )


def _bytes_per_chip(tree: Any) -> int:
    shapes = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree)]
    return sum(jnp.dtype(dtype).itemsize * math.prod(shape) for shape, dtype in shapes)


def _counted(
    found: list[ProgramCollective], compiled: ModelConfig, full: ModelConfig
) -> tuple[tuple[ProgramCollective, int], ...]:
    """Counts equal collectives, those of a layer once for every such layer of the full model."""
    times = Counter[ProgramCollective]()
    last = compiled.num_layers - 1
    left = Counter(full.blocks[:-1])
    for one in found:
        layer = one.layer
        cut = compiled.num_layers < full.num_layers
        scale = left[compiled.blocks[layer]] if cut and layer is not None and layer < last else 1
        times[one._replace(operation="")] += scale
    return tuple(sorted(times.items(), key=lambda item: -item[0].num_bytes * item[1]))
