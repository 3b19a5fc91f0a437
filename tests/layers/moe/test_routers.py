"""Routers give numbers that can be checked by hand, and keep non-finite tokens apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.moe.routers.expert_choice import ExpertChoice
from decodax.layers.moe.routers.top_k import TopK

BATCH, TOKENS, WIDTH = 3, 11, 7


def as_float32(weights):
    return {name: jnp.asarray(weight, jnp.float32) for name, weight in weights.items()}


def test_a_nonfinite_token_changes_no_other_and_has_experts():
    router, random = TopK(16, 6, "sigmoid", True, num_groups=4, num_groups_kept=2), np.random.default_rng(3)
    weights = {"weight": random.standard_normal((16, WIDTH)).astype(np.float32)}
    tokens, run = random.standard_normal((BATCH, TOKENS, WIDTH)).astype(np.float32), jax.jit(router.route)
    finite, others = run(tokens, weights), np.ones((BATCH, TOKENS), bool)
    tokens[1, 2], others[1, 2] = np.nan, False
    got = run(tokens, weights)
    np.testing.assert_array_equal(np.asarray(got.expert)[others], np.asarray(finite.expert)[others])
    np.testing.assert_array_equal(np.asarray(got.gate)[others], np.asarray(finite.gate)[others])
    assert np.all((got.expert >= 0) & (got.expert < 16))


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


def test_a_nonfinite_token_is_chosen_by_no_expert():
    run = jax.jit(ExpertChoice(3, 1.0).route)
    tokens = np.random.default_rng(6).standard_normal((2, 6, WIDTH)).astype(np.float32)
    weights = {"weight": jnp.asarray(np.random.default_rng(7).standard_normal((3, WIDTH)), jnp.float32)}
    finite = run(tokens, weights)
    tokens[1, 4] = np.nan
    got = run(tokens, weights)
    assert np.all(got.expert[1, 4] == -1) and np.all(got.gate[1, 4] == 0)
    np.testing.assert_array_equal(got.expert[0], finite.expert[0])
    assert (np.asarray(got.expert[1]) >= 0).sum() == 6


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
