"""A loaded model with experts placed over devices by a table gives the same logits; bad tables are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.moe.placement import Placement
from decodax.models.load import load
from decodax.models.placed_experts import place_experts
from decodax.sharding.rules import Rules
from tests.golden_files import load_golden

GOLDEN = load_golden("qwen3_moe")  # three layers of seven experts
MESH = jax.make_mesh((4,), ("expert",), devices=jax.devices()[:4])
RULES = Rules((("E", "expert"),))
# The experts in another order, two of them twice, one slot empty; slots are (device, slot).
TABLE = Placement(
    7,
    4,
    3,
    (((3, 0),), ((0, 1), (2, 2)), ((1, 0),), ((1, 2),), ((0, 0), (3, 1), (2, 0)), ((2, 1),), ((1, 1), (0, 2))),
)


@pytest.fixture(scope="module")
def lm():
    return load(GOLDEN.folder, dtype="float32")


def logits_of(model, params):
    tokens = jnp.asarray(GOLDEN.tokens[1:2], jnp.int32)
    position = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]

    @jax.jit
    def run(params):
        forward = model.apply(params, tokens, position)
        return model.logits(params, forward.hidden), forward.routes[0].expert

    return run(params)


@pytest.mark.parametrize("dispatch", ["gather_scatter", "all_to_all"])
@pytest.mark.quick_cases(1)
def test_the_same_logits_and_the_same_choices(lm, dispatch):
    model, params = place_experts(lm.model, lm.params, TABLE, MESH, RULES)
    gate = params["blocks_0"]["feed_forward"]["experts"]["gate"]
    assert gate.shape[0] == 12 and gate.sharding.shard_shape(gate.shape)[0] == 3
    router = params["blocks_0"]["feed_forward"]["router"]["weight"]
    assert router.sharding.is_fully_replicated and len(router.sharding.device_set) == 4
    model = type(model)(model.config, execution=type(model.execution)(mesh=MESH, rules=RULES, experts=dispatch))
    got, want = logits_of(model, params), logits_of(lm.model, lm.params)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5 * np.abs(want[0]).max())
    np.testing.assert_array_equal(got[1], want[1])


def test_tables_that_do_not_fit(lm):
    with pytest.raises(
        ValueError, match=r"layers \[0, 1, 2\] have experts and need a placement each, got them for \[1"
    ):
        place_experts(lm.model, lm.params, {1: TABLE}, MESH, RULES)
    with pytest.raises(ValueError, match="split experts over 4 devices of the mesh, and its placement is for 7"):
        place_experts(lm.model, lm.params, Placement.contiguous(7, 7), MESH, RULES)
    with pytest.raises(ValueError, match="must be of the router's 7 experts, got one of 8"):
        place_experts(lm.model, lm.params, Placement.contiguous(8, 4), MESH, RULES)
    with pytest.raises(ValueError, match="5 devices are more than 4 experts x 1 slices: cut experts into slices=2"):
        Placement.contiguous(4, 5)
    model, params = place_experts(lm.model, lm.params, TABLE, MESH, RULES)
    with pytest.raises(ValueError, match="has a placement already"):
        place_experts(model, params, TABLE, MESH, RULES)
