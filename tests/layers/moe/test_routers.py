"""Routers equal NumPy float64, and numbers that can be checked by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.moe.routers.expert_choice import ExpertChoice
from decodax.layers.moe.routers.top_k import TopK
from tests.oracles.mixture_of_experts import route

BATCH, TOKENS, WIDTH = 3, 11, 7

# Router, and the oracle's options for it.
SOFTMAX, SIGMOID = {"score": "softmax"}, {"score": "sigmoid"}
CASES = {
    "mixtral": (TopK(5, 2, "softmax", True), {**SOFTMAX, "renormalise": True}),
    "olmoe": (TopK(13, 3, "softmax", False), {**SOFTMAX, "renormalise": False}),
    "gpt-oss": (TopK(8, 4, "softmax", True, router_bias=True), {**SOFTMAX, "renormalise": True}),
    "deepseek v2": (
        TopK(15, 4, "softmax", False, scale=16.0, num_groups=5, num_groups_kept=2),
        {**SOFTMAX, "renormalise": False, "scale": 16.0, "groups": 5, "kept": 2},
    ),
    "deepseek v3": (
        TopK(16, 6, "sigmoid", True, 2.5, selection_bias=True, num_groups=4, num_groups_kept=2, group_score="top2_sum"),
        {**SIGMOID, "renormalise": True, "scale": 2.5, "groups": 4, "kept": 2, "by": "top2"},
    ),
    "sigmoid alone": (TopK(6, 6, "sigmoid", False), {**SIGMOID, "renormalise": False}),
}


def random_weights(router, random):
    return {name: random.standard_normal(w.shape) for name, w in router.weights(WIDTH).items()}


def as_float32(weights):
    return {name: jnp.asarray(weight, jnp.float32) for name, weight in weights.items()}


@pytest.mark.parametrize("case", CASES)
def test_equals_a_sort_in_float64(case):
    router, options = CASES[case]
    random = np.random.default_rng(3)
    weights = random_weights(router, random)
    tokens = random.standard_normal((BATCH, TOKENS, WIDTH))
    run = jax.jit(router.route)
    got = run(jnp.asarray(tokens, jnp.float32), as_float32(weights))
    logits = tokens.reshape(-1, WIDTH) @ weights["weight"].T + weights.get("bias", 0)
    bias = weights.get("selection_bias", 0)
    expert, gate = route(logits, router.experts_per_token, selection_bias=bias, **options)
    np.testing.assert_array_equal(got.expert.reshape(expert.shape), expert)
    assert got.gate.dtype == jnp.float32 and got.num_overflowed == 0
    np.testing.assert_allclose(got.gate.reshape(gate.shape), gate, rtol=2e-5)  # float32 sums of 7, an exponential
    alone = run(jnp.asarray(tokens[1:2], jnp.float32), as_float32(weights))
    np.testing.assert_array_equal(alone.expert[0], got.expert[1])

    # A non-finite token changes no other, and has experts too.
    tokens[1, 2] = np.nan
    nonfinite = run(jnp.asarray(tokens, jnp.float32), as_float32(weights))
    others = np.ones((BATCH, TOKENS), bool)
    others[1, 2] = False
    np.testing.assert_array_equal(nonfinite.expert[others], got.expert[others])
    np.testing.assert_array_equal(nonfinite.gate[others], got.gate[others])
    assert np.all((nonfinite.expert >= 0) & (nonfinite.expert < router.num_experts))


def by_hand(router, logits, **more):
    """The choices of one token with these logits: its vector is (1, 0), the weights' first column the logits."""
    weight = jnp.stack([jnp.asarray(logits, jnp.float32), jnp.ones(len(logits))], axis=1)
    routes = router.route(jnp.asarray([[[1.0, 0.0]]]), {"weight": weight, **as_float32(more)})
    return routes.expert[0, 0].tolist(), routes.gate[0, 0].tolist()


def test_numbers_by_hand():
    logits = np.log([1.0, 4.0, 2.0, 3.0])  # softmax: 0.1, 0.4, 0.2, 0.3
    assert by_hand(TopK(4, 2, "softmax", False), logits) == ([1, 3], pytest.approx([0.4, 0.3]))
    assert by_hand(TopK(4, 2, "softmax", True), logits) == ([1, 3], pytest.approx([4 / 7, 3 / 7]))
    # Groups {0, 1} and {2, 3}: the maxima 0.4 and 0.3 keep the first, the sums 0.5 and 0.5 too, as it comes first.
    grouped = {"num_groups": 2, "num_groups_kept": 1}
    assert by_hand(TopK(4, 2, "softmax", False, **grouped), logits) == ([1, 0], pytest.approx([0.4, 0.1]))
    # sigmoid of log(x): x / (1 + x) = 1/2, 4/5, 2/3, 3/4; a bias moves the choice, and not the gates.
    chosen, gates = by_hand(
        TopK(4, 2, "sigmoid", True, 10.0, selection_bias=True), logits, selection_bias=[0.6, 0, 0, -0.4]
    )
    assert chosen == [0, 1] and gates == pytest.approx([10 * 0.5 / 1.3, 10 * 0.8 / 1.3])


def test_the_lowest_index_wins_among_equal_scores():
    assert by_hand(TopK(5, 3, "softmax", True), [0.0, 1.0, 1.0, 1.0, 1.0])[0] == [1, 2, 3]


def test_scores_are_float32_whatever_the_tokens_are():
    """Exact products of bfloat16, in sums that bfloat16 could not distinguish."""
    weight = jnp.asarray([[1.0, 2.0**-9], [1.0, 2.0**-8], [1.0, 0.0]], jnp.bfloat16)
    routes = TopK(3, 3, "softmax", True).route(jnp.asarray([[[1.0, 1.0]]], jnp.bfloat16), {"weight": weight})
    assert routes.expert[0, 0].tolist() == [1, 0, 2] and routes.gate.dtype == jnp.float32


@pytest.mark.parametrize("experts_per_token", [1.5, 5.0])
def test_each_expert_takes_its_best_tokens(experts_per_token):
    random = np.random.default_rng(4)
    router = ExpertChoice(5, experts_per_token)
    weights = random_weights(router, random)
    tokens = random.standard_normal((BATCH, TOKENS, WIDTH))
    routes = jax.jit(router.route)(jnp.asarray(tokens, jnp.float32), as_float32(weights))
    assert routes.expert.shape == (BATCH, TOKENS, 5)
    num_taken = int(np.ceil(TOKENS * experts_per_token / 5))
    for row in range(BATCH):
        logits = tokens[row] @ weights["weight"].T
        scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        for expert in range(5):
            taken = np.sort(np.argsort(-scores[:, expert])[:num_taken])
            chosen = np.asarray(routes.expert[row, :, expert])
            np.testing.assert_array_equal(np.flatnonzero(chosen >= 0), taken)
            assert set(chosen) <= {-1, expert}
            np.testing.assert_allclose(routes.gate[row, taken, expert], scores[taken, expert], rtol=2e-5)


def test_a_nonfinite_token_is_chosen_by_no_expert():
    run = jax.jit(ExpertChoice(3, 1.0).route)
    tokens = np.random.default_rng(6).standard_normal((2, 6, WIDTH)).astype(np.float32)
    weights = {"weight": jnp.asarray(np.random.default_rng(7).standard_normal((3, WIDTH)), jnp.float32)}
    finite = run(jnp.asarray(tokens), weights)
    tokens[1, 4] = np.nan
    got = run(jnp.asarray(tokens), weights)
    assert np.all(got.expert[1, 4] == -1) and np.all(got.gate[1, 4] == 0)
    np.testing.assert_array_equal(got.expert[0], finite.expert[0])
    assert (np.asarray(got.expert[1]) >= 0).sum() == 6


def test_without_jit():
    router = CASES["deepseek v3"][0]
    weights = as_float32(random_weights(router, np.random.default_rng(8)))
    tokens = jnp.asarray(np.random.default_rng(9).standard_normal((1, 5, WIDTH)), jnp.float32)
    np.testing.assert_array_equal(router.route(tokens, weights).expert, jax.jit(router.route)(tokens, weights).expert)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts_per_token": 7}, r"experts_per_token must be in 1\.\.6 \(num_experts\), got 7"),
        ({"experts_per_token": 0}, r"experts_per_token must be in 1\.\.6"),
        ({"score": "tanh"}, "'softmax' or 'sigmoid', got 'tanh'"),
        ({"num_groups": 4, "num_groups_kept": 2}, "num_experts must divide by num_groups, got 6 and 4"),
        ({"num_groups": 3}, "must be given together"),
        ({"num_groups": 3, "num_groups_kept": 4}, r"num_groups_kept must be in 1\.\.3 \(num_groups\), got 4"),
        ({"num_groups": 3, "num_groups_kept": 1, "experts_per_token": 3}, "1 groups of 2: keep more groups"),
        (
            {"num_groups": 6, "num_groups_kept": 3, "group_score": "top2_sum"},
            "needs groups of at least 2 experts, got 6 of 1",
        ),
        ({"group_score": "mean"}, "'max' or 'top2_sum', got 'mean'"),
    ],
)
def test_bad_options(options, words):
    valid = TopK(6, 2, "softmax", True)
    fields = {field.name: getattr(valid, field.name) for field in dataclasses.fields(valid)}
    unchecked = object.__new__(TopK)  # outside tests annotations are not checked
    vars(unchecked).update(fields | options)
    with pytest.raises(ValueError, match=words):
        unchecked.__post_init__()


def test_bad_share_of_expert_choice():
    with pytest.raises(ValueError, match="above 0 and at most num_experts = 4, got 5"):
        ExpertChoice(4, 5.0)
