"""Every router does what the contract says: it equals NumPy float64, row by row, whatever the tokens' dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.moe.routers import METHODS, Router
from tests.contracts.examples import routers
from tests.contracts.lookup import examples_of

EXAMPLES = examples_of(routers, METHODS)
BATCH, TOKENS, WIDTH = 3, 11, 7
TOLERANCE = 2e-5  # float32 sums of 7, and an exponential; relative


class Case:
    """A router with random weights and tokens, which bfloat16 holds exactly, and its routes."""

    def __init__(self, example):
        self.router, self.wanted = example.router, example.wanted
        random = np.random.default_rng(3)
        described = self.router.weights(WIDTH)
        draw = lambda shape: random.standard_normal(shape).astype(jnp.bfloat16).astype(np.float32)
        self.weights = {name: draw(weight.shape) for name, weight in described.items()}
        self.tokens = draw((BATCH, TOKENS, WIDTH))
        self.run = jax.jit(self.router.route)
        self.routes = self.run(self.tokens, self.weights)


@pytest.fixture(scope="module", params=EXAMPLES)
def case(request):
    return Case(EXAMPLES[request.param])


def assert_same(got, want, tolerance=0.0):
    np.testing.assert_array_equal(got.expert, want.expert)
    np.testing.assert_allclose(got.gate, want.gate, rtol=tolerance)


def test_weights_and_the_number_of_experts(request, case):
    router = case.router
    assert type(router) is EXAMPLES.method_of(request.node.callspec.params["case"]) and isinstance(router, Router)
    assert router.weights(WIDTH)["weight"].shape == (router.num_experts, WIDTH)
    expert = np.asarray(case.routes.expert)
    assert expert.shape[:2] == (BATCH, TOKENS) and expert.min() >= -1 and expert.max() < router.num_experts
    # Where experts choose, each takes a whole number of tokens.
    mean = (expert >= 0).sum() / (BATCH * TOKENS)
    assert router.experts_per_token <= mean < router.experts_per_token + router.num_experts / TOKENS


def test_equals_float64(case):
    assert case.routes.gate.dtype == jnp.float32 and case.routes.num_overflowed == 0
    weights = {name: weight.astype(np.float64) for name, weight in case.weights.items()}
    for row, tokens in enumerate(case.tokens.astype(np.float64)):
        expert, gate = case.wanted(tokens, weights)
        np.testing.assert_array_equal(case.routes.expert[row], expert)
        np.testing.assert_allclose(case.routes.gate[row], gate, rtol=TOLERANCE)


def test_rows_do_not_affect_each_other(case):
    """Neither by what is in them, to the last bit, nor by their number, for which there is another program."""
    in_row = lambda routes: jax.tree.map(lambda leaf: leaf[1:2] if leaf.ndim else leaf, routes)
    others = np.where((np.arange(BATCH) == 1)[:, None, None], case.tokens, np.nan)
    assert_same(in_row(case.run(others, case.weights)), in_row(case.routes))
    assert_same(case.run(case.tokens[1:2], case.weights), in_row(case.routes), TOLERANCE)


def test_scores_are_float32_whatever_the_dtype(case):
    """Of bfloat16 tokens and weights the routes are those of the same numbers in float32."""
    tokens, weights = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (case.tokens, case.weights))
    assert_same(case.run(tokens, weights), case.routes, TOLERANCE)


@pytest.mark.parametrize("case", EXAMPLES.one_of_each, indirect=True)
def test_eager_is_jitted(case):
    got = case.router.route(jnp.asarray(case.tokens), jax.tree.map(jnp.asarray, case.weights))
    assert_same(got, case.routes, TOLERANCE)
