"""Collectives of the compiled decoding loop: two all-reduces per layer, and no more."""

from collections import Counter

import jax
import numpy as np
import pytest

from decodax import decoding
from decodax.decoding.drafters import DraftModel
from decodax.decoding.verifiers import ExactMatch
from tests.sharding import wide
from tests.sharding.collectives import collectives

NUM_LAYERS = 2
FLOAT_BYTES = 4


def compiled(kind, mesh, decode=decoding.autoregressive, **execution):
    model, params = wide.model_of(kind, mesh, **execution), wide.params_of(kind, mesh)
    state = wide.start(model, params)
    return jax.jit(decode(model), donate_argnums=1).lower(params, state).compile(), state


def by_layer(program):
    """(how often each kind occurs in each layer, and the collectives outside of layers)."""
    found = collectives(program)
    counts = {layer: Counter() for layer in range(NUM_LAYERS)}
    for collective in found:
        if collective.layer is not None:
            counts[collective.layer][collective.kind] += 1
    return counts, [collective for collective in found if collective.layer is None]


@pytest.mark.parametrize("kind", ["dense", "mla", "odd"])
@pytest.mark.quick_cases(1)
def test_tensor_parallel_layers_have_two_all_reduces(kind):
    """No collective is as large as the logits, though half of the rows are sampled: the vocabulary stays sharded.

    The same holds where the vocabulary is padded.
    """
    program, _ = compiled(kind, "tensor=8")
    counts, others = by_layer(program)
    assert set(map(tuple, (count.items() for count in counts.values()))) == {(("all-reduce", 2),)}
    assert {collective.kind for collective in others} == {"all-reduce"}
    embedded = wide.NUM_ROWS * wide.WIDTH * FLOAT_BYTES
    assert (
        max(collective.num_bytes for collective in others) <= embedded < wide.NUM_ROWS * wide.VOCABULARY * FLOAT_BYTES
    )


@pytest.mark.slow
def test_a_replicated_draft_has_no_collectives():
    """Its state included, whatever the sharding rules of the target model."""
    model, params = wide.model_of("dense", "tensor=8"), wide.params_of("dense", "tensor=8")
    decode = decoding.speculative(model, DraftModel(wide.draft_model("dense", model), (-1, 0, 0, 1)), ExactMatch())
    draft, state = model.execution.replicated(wide.draft_of("dense")), wide.start(model, params)
    state = jax.jit(decode.start)(params, draft, state)
    program = jax.jit(decode, donate_argnums=2).lower(params, draft, state).compile()
    of_draft = [one for one in collectives(program) if "DraftModel" in one.operation]
    assert of_draft == []
    of_model = Counter(one.layer for one in collectives(program) if one.layer is not None)
    assert of_model == {0: 2, 1: 2}


def test_data_parallel_layers_have_no_collectives():
    counts, others = by_layer(compiled("dense", "data=8")[0])
    assert not any(counts.values())
    assert max(collective.num_bytes for collective in others) <= FLOAT_BYTES  # whether all rows are done, and how far


def test_sequence_parallelism_turns_every_all_reduce_into_reduce_scatter_and_all_gather():
    counts, others = by_layer(compiled("dense", "tensor=8", sequence_parallel=True)[0])
    last = counts[NUM_LAYERS - 1]
    last["all-gather"] -= 1  # of the last layer's output
    assert list(counts.values()) == [{"reduce-scatter": 2, "all-gather": 2}] * NUM_LAYERS
    assert {collective.kind for collective in others} == {"all-reduce"}


def test_experts_on_the_rows_of_their_group():
    """An expert layer over a data axis has no more all-reduces than a dense one, and moves no rows between groups."""
    counts, _ = by_layer(compiled("moe", "tensor=4,data=2")[0])
    assert [count.keys() for count in counts.values()] == [{"all-reduce"}] * NUM_LAYERS


@pytest.mark.parametrize("mesh", ["tensor=8", "tensor=2,data=4"])
def test_caches_are_neither_gathered_nor_copied(mesh):
    program, state = compiled("dense", mesh)
    text = program.as_text()
    for cache in state.caches:
        for buffer in (cache.key, cache.value):
            shard = buffer.sharding.shard_shape(buffer.shape)
            for shape in (shard, buffer.shape):
                written = f"f32[{','.join(map(str, shape))}]"
                assert not [line for line in text.splitlines() if f"= {written}" in line and " copy(" in line]
            assert np.prod(shard) < buffer.size
    gathered = [collective.num_bytes for collective in collectives(program)]
    assert max(gathered) < state.caches[0].key.nbytes // 8
