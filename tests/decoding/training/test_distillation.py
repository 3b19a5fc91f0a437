"""The divergence between target and draft, and the acceptance rate, equal NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.decoding.training.distillation import (
    AcceptanceMeter,
    Distillation,
    kl_divergence,
    tokens_per_forward,
    window_logits,
)

ROWS = np.random.default_rng(3).integers(0, 37, size=(5, 12)).astype(np.int32)
# float32 sums over 37 tokens, after a layer of products of at most 29 terms, on values of order one
RTOL = 1e-4


def probs(logits):
    """Probabilities in float64."""
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def kl_oracle(target, draft):
    p, q = probs(target), probs(draft)
    return np.sum(p * (np.log(p) - np.log(q)), axis=-1)


@pytest.fixture(scope="module")
def draft_params(target):
    """The draft has the target's shape and other weights."""
    return jax.tree.map(lambda leaf: leaf + 0.2 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), target.params)


@pytest.fixture(scope="module")
def logits(target, draft_params):
    """Logits of target and draft for all rows, computed one row at a time."""
    run = jax.jit(lambda params, tokens: window_logits(target.model, params, tokens))
    tokens = [jnp.asarray(row[None, :-1]) for row in ROWS]
    return [np.concatenate([run(params, row) for row in tokens]) for params in (target.params, draft_params)]


def test_kl_is_the_formula_s():
    draw = np.random.default_rng(0)
    target, draft = (jnp.asarray(4 * draw.normal(size=(3, 5, 11)), jnp.float32) for _ in range(2))
    for function in (kl_divergence, jax.jit(kl_divergence)):
        np.testing.assert_allclose(function(target, draft), kl_oracle(target, draft), rtol=1e-5)
        np.testing.assert_allclose(function(target, target), np.zeros((3, 5)), atol=1e-6)
    # Disjoint distributions, and logits far from zero, stay finite.
    far = kl_divergence(jnp.array([900.0, 0.0]), jnp.array([0.0, 900.0]))
    assert float(far) == pytest.approx(900.0)


def test_the_loss_is_the_mean_over_all_positions_and_runs_all_tokens_but_the_last(target, draft_params, logits):
    wanted = kl_oracle(*logits).mean()
    loss = jax.jit(Distillation(target.model, target.model).loss)
    assert float(loss(draft_params, target.params, ROWS)) == pytest.approx(wanted, rel=RTOL)
    other_end = np.concatenate([ROWS[:, :-1], ROWS[:, -1:] * 0], axis=1)
    assert float(loss(draft_params, target.params, other_end)) == pytest.approx(wanted, rel=RTOL)


def test_no_gradient_reaches_the_target(target, draft_params):
    loss = Distillation(target.model, target.model).loss
    of_draft, of_target = jax.jit(jax.grad(loss, argnums=(0, 1)))(draft_params, target.params, ROWS)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(of_target))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(of_draft))


def test_acceptance_is_the_oracle_s_whatever_the_batch(target, draft_params, logits):
    p, q = map(probs, logits)
    greedy = np.mean(p.argmax(axis=-1) == q.argmax(axis=-1))
    order = np.argsort(-q, axis=-1, kind="stable")
    ranks = [np.mean(order[..., rank] == p.argmax(axis=-1)) for rank in range(8)]
    sampling = np.mean(1 - np.abs(p - q).sum(axis=-1) / 2)
    meter = AcceptanceMeter(target.model, target.model)
    for batch in (2, 5):  # in the first case the last piece is half full
        found = meter(target.params, draft_params, ROWS, batch=batch)
        assert found.tokens == 55
        assert found.greedy == pytest.approx(greedy, abs=1e-6)  # a count
        assert found.rank_acceptance == pytest.approx(ranks, abs=1e-6) and found.rank_acceptance[0] == found.greedy
        assert found.sampling == pytest.approx(sampling, rel=RTOL)
        assert found.kl == pytest.approx(kl_oracle(*logits).mean(), rel=RTOL)
    itself = meter(target.params, target.params, ROWS, batch=5)
    assert (itself.greedy, itself.kl) == (1.0, 0.0) and itself.sampling == pytest.approx(1.0, rel=1e-5)


def test_expected_tokens_are_those_of_the_closed_form_and_of_a_simulation():
    for chance in (0.0, 0.3, 0.75):
        assert tokens_per_forward(chance, 4) == pytest.approx((1 - chance**5) / (1 - chance))
    accepted = np.random.default_rng(0).random((200_000, 4)) < 0.75
    emitted = 1 + np.cumprod(accepted, axis=1).sum(axis=1)
    # The mean of 200,000 values with a standard deviation of at most 2 is off by 5 standard errors once in a million.
    assert tokens_per_forward(0.75, 4) == pytest.approx(emitted.mean(), abs=5 * 2 / 200_000**0.5)
