"""Every rejection rule gives exactly the target distribution, by enumeration of all draws of the children.

The rule gives the acceptance probability of each child and the residual distribution after a rejection. Summed over
all draws of the children, weighted by their probabilities, that is the distribution of the output token.
"""

import doctest
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.decoding import rejection_sampling, verifiers
from decodax.decoding.drafters import Children
from decodax.decoding.verifiers import DeterministicTree, TreeRejection, TreeRejectionWithoutReplacement
from tests.oracles.verification import normalised, ordered_children

VOCABULARY, CHILDREN = 6, 3
RULES = {
    Children.INDEPENDENT: TreeRejection(),
    Children.WITHOUT_REPLACEMENT: TreeRejectionWithoutReplacement(),
    Children.CHOSEN: DeterministicTree(),
}
# p and q are exact in float64 and rounded once to float32 (6e-8 of each); three rejections subtract and divide, and the
# sum over all draws weighs every distribution by its probability, so errors add up and are not magnified.
EXACT = 1e-6


def random_distributions(number, seed=0):
    """Targets and drafts that resemble them, as the tables of exact distributions in the literature use."""
    random = np.random.default_rng(seed)
    for _ in range(number):
        p = normalised(np.exp(1.5 * random.normal(size=VOCABULARY)))
        yield p, normalised(np.exp(np.log(p) + random.normal(size=VOCABULARY)))


P = normalised(np.array([5.0, 1.0, 3.0, 0.5, 8.0, 2.0]))
ADVERSARIAL = {
    "the draft lacks the target's best": (P, normalised(np.array([3.0, 1.0, 0.0, 2.0, 0.0, 0.0]))),
    "the draft has one token": (P, np.eye(VOCABULARY)[3]),
    "the draft is peaked at the target's worst": (P, normalised(np.array([1e-5, 1e-6, 1e-4, 1.0, 1e-7, 1e-5]))),
    "the draft is too peaked for float32": (P, normalised(np.array([1e-40, 1e-42, 1.0, 1e-41, 2e-40, 1e-38]))),
    "the draft is the target": (P, P),
    "the target forbids the draft's best": (
        normalised(np.array([0.0, 1.0, 0.0, 2.0, 0.0, 1.5])),
        normalised(np.array([4.0, 1.0, 3.0, 0.1, 2.0, 0.0])),
    ),
    "they have nothing in common": (
        normalised(np.array([1.0, 0.0, 2.0, 0.0, 3.0, 0.0])),
        normalised(np.array([0.0, 1.0, 0.0, 2.0, 0.0, 3.0])),
    ),
    "both are certain": (np.eye(VOCABULARY)[2], np.eye(VOCABULARY)[2]),
    "the target is certain": (np.eye(VOCABULARY)[2], P),
}


@partial(jax.jit, static_argnums=0)
def try_children(rule, target_probs, logprobs, tokens):
    """Tries the children of many rows in order: the acceptance probability of each, and the residual distribution."""
    accepted, residuals = [], [target_probs]
    for i in range(tokens.shape[1]):
        is_there = tokens[:, i] >= 0  # -1: no child
        token = jnp.maximum(tokens[:, i], 0)
        probability = jax.vmap(rule.acceptance)(residuals[-1], logprobs, token)
        residual, rest = jax.vmap(rule.reject)(residuals[-1], logprobs, token)
        accepted.append(jnp.where(is_there, probability, 0))
        residuals.append(jnp.where(is_there[:, None], residual, residuals[-1]))
        logprobs = None if logprobs is None else jnp.where(is_there[:, None], rest, logprobs)
    return jnp.stack(accepted, axis=1), residuals[-1]


def enumerate_draws(rule, p, q, kind, num_children=CHILDREN, dtype=np.float32):
    """The distribution of the output token, and the probability that it is one of the children."""
    ways = ordered_children(q, num_children, kind.value)
    tokens = np.full((VOCABULARY**num_children, num_children), -1, np.int32)  # one size, so one compile
    live = np.zeros(len(tokens))
    for row, (way, probability) in enumerate(ways):
        tokens[row, : len(way)], live[row] = way, probability
    with np.errstate(divide="ignore"):
        logprobs = np.tile(np.log(q).astype(dtype), (len(tokens), 1))
    target_probs = np.tile(p.astype(dtype), (len(tokens), 1))
    taken, left = try_children(rule, jnp.asarray(target_probs), jnp.asarray(logprobs), jnp.asarray(tokens))
    assert taken.dtype == left.dtype == dtype
    taken, left = np.asarray(taken, np.float64), np.asarray(left, np.float64)
    output, accepted = np.zeros(VOCABULARY), 0.0
    for i in range(num_children):
        np.add.at(output, np.maximum(tokens[:, i], 0), live * taken[:, i])
        accepted += (live * taken[:, i]).sum()
        live = live * (1 - taken[:, i])
    return output + live @ left, accepted


def total_variation(one, other):
    return np.abs(one - other).sum() / 2


def largest_error(rule, kind, distributions, **options):
    return max(total_variation(enumerate_draws(rule, p, q, kind, **options)[0], p) for p, q in distributions)


@pytest.mark.parametrize("kind", Children)
def test_the_output_has_exactly_the_target_distribution(kind):
    rule = RULES[kind]
    assert kind in rule.supported_children and rule.lossless
    assert largest_error(rule, kind, random_distributions(40)) < EXACT
    for name, (p, q) in ADVERSARIAL.items():
        output, _ = enumerate_draws(rule, p, q, kind)
        assert total_variation(output, p) < EXACT, name
        assert output[p == 0].sum() == 0, name
    # One child is a chain, whose rule is made of the same functions.
    assert largest_error(rule, kind, [*random_distributions(10), *ADVERSARIAL.values()], num_children=1) < EXACT


@pytest.mark.parametrize("kind", Children)
def test_the_rule_is_exact_and_not_only_near(kind):
    with jax.enable_x64(True):
        assert largest_error(RULES[kind], kind, random_distributions(10), dtype=np.float64) < 1e-14


@pytest.mark.parametrize("kind", Children)
def test_the_rule_of_chosen_children_holds_for_drawn_ones(kind):
    assert kind in DeterministicTree.supported_children
    assert largest_error(DeterministicTree(), kind, random_distributions(10)) < EXACT


class ChosenByRatio(TreeRejection):
    """A common mistake: the draft's most probable tokens are accepted with p/q as if they had been drawn."""

    supported_children = frozenset({Children.CHOSEN})


class TargetAfterRejection(TreeRejection):
    """A common mistake: after a rejection the token is drawn from p and not from the residual distribution."""

    def reject(self, target_probs, logprobs, token):
        return target_probs, logprobs


class KeepsDraftDistribution(TreeRejectionWithoutReplacement):
    """Children drawn without replacement, judged by the distribution of the first."""

    def reject(self, target_probs, logprobs, token):
        return super().reject(target_probs, logprobs, token)[0], logprobs


@pytest.mark.parametrize(
    "rule, kind, num_children",
    [
        (ChosenByRatio(), Children.CHOSEN, 3),
        (ChosenByRatio(), Children.CHOSEN, 1),
        (TargetAfterRejection(), Children.INDEPENDENT, 3),
        (TargetAfterRejection(), Children.INDEPENDENT, 1),
        (KeepsDraftDistribution(), Children.WITHOUT_REPLACEMENT, 3),
        (TreeRejection(), Children.WITHOUT_REPLACEMENT, 3),
        (TreeRejectionWithoutReplacement(), Children.INDEPENDENT, 3),
    ],
)
def test_wrong_rules_are_caught(rule, kind, num_children):
    # The smallest, two children of a kind with the other kind's rule, is off by hundredths.
    assert largest_error(rule, kind, random_distributions(40), num_children=num_children) > 1000 * EXACT


def test_a_chain_accepts_one_minus_the_total_variation():
    for p, q in [*random_distributions(40), *ADVERSARIAL.values()]:
        for kind in (Children.INDEPENDENT, Children.WITHOUT_REPLACEMENT):
            accepted = enumerate_draws(RULES[kind], p, q, kind, num_children=1)[1]
            np.testing.assert_allclose(accepted, 1 - total_variation(p, q), atol=EXACT)


def test_trees_accept_more_than_naive_sampling_and_most_without_replacement():
    accepted = {kind: [] for kind in RULES}
    for p, q in random_distributions(40, seed=1):
        for kind, rule in RULES.items():
            accepted[kind].append(enumerate_draws(rule, p, q, kind)[1])
            # Naive sampling draws from p and accepts if that is a child.
            naive = sum(way * p[list(set(tokens))].sum() for tokens, way in ordered_children(q, CHILDREN, kind.value))
            if kind is Children.INDEPENDENT:
                assert accepted[kind][-1] >= naive - EXACT
            if kind is Children.CHOSEN:
                np.testing.assert_allclose(accepted[kind][-1], naive, atol=EXACT)
    mean = {kind: np.mean(values) for kind, values in accepted.items()}
    assert mean[Children.WITHOUT_REPLACEMENT] > mean[Children.INDEPENDENT] + 0.01
    assert min(np.subtract(accepted[Children.WITHOUT_REPLACEMENT], accepted[Children.INDEPENDENT])) > -0.02


def test_impossible_tokens_are_never_drawn_even_when_only_rounding_is_left():
    p = normalised(np.array([3.0, 0.0, 5.0, 0.0, 1.0, 2.0])).astype(np.float32)
    with np.errstate(divide="ignore"):
        logprobs = np.log(p)
    for nudge in (-1, 0, 1):  # the draft is the target but for the last bit
        near = np.nextafter(logprobs, np.float32(nudge * np.inf)) if nudge else logprobs
        for rule in RULES.values():
            residual, rest = jnp.asarray(p), jnp.asarray(near)
            for token in jnp.array([2, 0, 5, 4]):
                assert 0 <= rule.acceptance(residual, rest, token) <= 1
                residual, rest = rule.reject(residual, rest, token)
                left = np.asarray(residual)
                assert np.isfinite(left).all() and not left[[1, 3]].any()
                np.testing.assert_allclose(left.sum(), 1, rtol=1e-6)


def test_every_rule_is_in_the_catalogue_and_its_examples_are_true():
    folder = Path(verifiers.__file__).parent
    files = {file.stem for file in folder.glob("*.py") if not file.stem.startswith("_")}
    assert set(verifiers.METHODS) == files - {"contract"}
    for name, rule in verifiers.METHODS.items():
        assert rule.__module__ == f"decodax.decoding.verifiers.{name}"
        assert rule.lossless == (name != "typical_acceptance")
    result = doctest.testmod(rejection_sampling)
    assert result.attempted == 3 and not result.failed
