"""Every sharding of a model over eight devices gives one device's results, in every decoding scheme."""

import jax
import numpy as np
import pytest

from decodax import decoding
from decodax.decoding.drafters import DraftModel
from decodax.decoding.verifiers import ExactMatch
from tests.sharding import wide

MESHES = ("tensor=8", "tensor=2,data=4", "tensor=2,expert=4", "data=2,expert=2,tensor=2")
QUICK = {
    ("odd", "tensor=8"),
    ("dense", "tensor=8"),
    ("moe", "data=2,expert=2,tensor=2"),
    ("mla", "tensor=2,data=4"),
    ("linear", "tensor=8"),
}
HAS_EXPERTS = ("moe", "mla", "odd_moe")
CASES = [
    pytest.param(kind, mesh, marks=() if (kind, mesh) in QUICK else pytest.mark.slow)
    for kind in wide.LAYERS | wide.ODD_LAYERS
    for mesh in MESHES
    if "expert" not in mesh or kind in HAS_EXPERTS
]
# All-reduces add in another order than one device: a few roundings of numbers of about 1, over a few layers.
LOGITS_TOLERANCE = 1e-4


@pytest.mark.parametrize(("kind", "mesh"), wide.runnable(CASES))
@pytest.mark.quick_cases(2)
def test_logits(kind, mesh):
    split = wide.full_logits(wide.model_of(kind, mesh), wide.params_of(kind, mesh))
    np.testing.assert_allclose(split, wide.single_logits(kind), atol=LOGITS_TOLERANCE, rtol=0)


@pytest.mark.parametrize(("kind", "mesh"), wide.runnable(CASES))
@pytest.mark.quick_cases(1)
def test_plain_decoding(kind, mesh):
    model, params = wide.model_of(kind, mesh), wide.params_of(kind, mesh)
    state = wide.start(model, params)
    places = [leaf.sharding for leaf in jax.tree.leaves(state.caches)]
    is_split = not all(place.is_fully_replicated for place in places)
    assert is_split or (kind, mesh) == ("mla", "tensor=8")  # latents have no heads
    out = jax.jit(decoding.autoregressive(model), donate_argnums=1)(params, state)
    assert [leaf.sharding for leaf in jax.tree.leaves(out.caches)] == places
    np.testing.assert_array_equal(out.tokens, wide.single_tokens(kind))


@pytest.mark.parametrize(("kind", "mesh"), wide.runnable(CASES))
@pytest.mark.quick_cases(1)
def test_speculative_decoding(kind, mesh):
    model, params = wide.model_of(kind, mesh), wide.params_of(kind, mesh)
    drafter = DraftModel.top_k(wide.draft_model(kind, model), (-1, 0, 0, 1))
    decode = jax.jit(decoding.speculative(model, drafter, ExactMatch()), donate_argnums=2)
    out = decode(params, model.execution.replicated(wide.draft_of(kind)), wide.start(model, params))
    np.testing.assert_array_equal(out.tokens, wide.single_tokens(kind))
    assert out.counts.accepted.sum() > 0


@pytest.mark.parametrize("kind", ["dense", pytest.param("moe", marks=pytest.mark.slow)])
def test_sequence_parallelism(kind):
    """Rows are sharded where they divide (eight rows), else tokens of a row (one row of sixteen)."""
    mesh = "tensor=4,data=2"
    model, params = wide.model_of(kind, mesh, sequence_parallel=True), wide.params_of(kind, mesh)
    np.testing.assert_allclose(wide.full_logits(model, params), wide.single_logits(kind), atol=LOGITS_TOLERANCE, rtol=0)
    out = jax.jit(decoding.autoregressive(model))(params, wide.start(model, params))
    np.testing.assert_array_equal(out.tokens, wide.single_tokens(kind))


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.quick_cases(1)
def test_fewer_rows_than_devices(num_rows):
    """Rows that do not divide over the devices are replicated."""
    model, params = wide.model_of("dense", "tensor=2,data=4"), wide.params_of("dense", "tensor=2,data=4")
    tokens, length = wide.PROMPTS[:num_rows], wide.LENGTHS[:num_rows]
    state = decoding.prefill(model, params, tokens, length, wide.NEW, np.arange(num_rows), stop_token_ids=wide.NO_STOPS)
    out = jax.jit(decoding.autoregressive(model))(params, state)
    end = wide.LENGTHS[0] + wide.NEW
    np.testing.assert_array_equal(out.tokens[0, :end], wide.single_tokens("dense")[0, :end])
