"""Typical acceptance accepts what the paper's threshold allows, is marked lossy, and can be turned off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.decoding.drafters import fixed_proposal
from decodax.decoding.random import Draw, draw_keys, gumbel
from decodax.decoding.tree import Tree
from decodax.decoding.verifiers import NodeRandom, TypicalAcceptance, typical_acceptance
from tests.oracles import verification as oracle

ROWS, VOCABULARY = 131, 11
PARENTS = (-1, 0, 0, 1, 0, 2, 1, 2, 4, 5, 3, 8)
SETTINGS = {
    "the paper's": (0.09, 0.3),
    "strict": (0.6, 2.0),
    "by entropy alone": (1.0, 0.5),
    "by a constant": (0.2, 1e9),
}
RANDOM = np.random.default_rng(5)
SHAPE = (ROWS, len(PARENTS))
# Distributions from nearly certain to nearly flat, with impossible tokens, and drafts that are mostly likely
# tokens.
LOGITS = RANDOM.normal(size=(*SHAPE, VOCABULARY)) * RANDOM.uniform(0.2, 5, (ROWS, 1, 1))
LOGITS[RANDOM.random(LOGITS.shape) < 0.2] = -np.inf
LOGITS[..., 3] = 0.5
LIKELY = np.argsort(-LOGITS, axis=2)
TOKEN = np.zeros(SHAPE, np.int32)
for _node, _parent in list(enumerate(PARENTS))[1:]:
    _rank = RANDOM.choice(VOCABULARY, ROWS, p=[0.5, 0.2, 0.1] + [0.2 / 8] * 8)
    TOKEN[:, _node] = LIKELY[np.arange(ROWS), _parent, _rank]
IS_CANDIDATE = RANDOM.random(SHAPE) < 0.9
PROPOSAL = fixed_proposal(Tree.fixed(PARENTS), jnp.asarray(TOKEN), jnp.asarray(IS_CANDIDATE))
SEED = jnp.arange(ROWS, dtype=jnp.uint32)
POSITION = jnp.asarray(Tree.fixed(PARENTS).depth + 7 + np.arange(ROWS)[:, None] % 5, jnp.int32)


@jax.jit
def verify(rule_numbers, logits):
    # Settings are numbers of the rule and so part of what is compiled; here they are traced to compile once.
    rule = object.__new__(TypicalAcceptance)
    object.__setattr__(rule, "epsilon", rule_numbers[0])
    object.__setattr__(rule, "delta", rule_numbers[1])
    return rule.verify(PROPOSAL, logits, NodeRandom(SEED, POSITION, 3))


@jax.jit
def noise_at(position):
    return gumbel(draw_keys(SEED, position, Draw.TOKEN), (VOCABULARY,))


def probabilities():
    weight = np.exp(LOGITS - LOGITS.max(axis=2, keepdims=True))
    return weight / weight.sum(axis=2, keepdims=True)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_longest_typical_path_then_a_draw_from_the_target(name):
    epsilon, delta = SETTINGS[name]
    verdict = verify(jnp.array([epsilon, delta], jnp.float32), jnp.asarray(LOGITS, jnp.float32))
    p = probabilities()
    nodes = []
    for row in range(ROWS):
        node, margin = oracle.typical_node(PARENTS, TOKEN[row], IS_CANDIDATE[row], p[row], epsilon, delta)
        # Probabilities and thresholds are good to 1e-5 in float32 (logits below 20, times 6e-8, and a sum of 11).
        assert margin > 1e-5
        assert verdict.node[row] == node
        nodes.append(node)
    assert len(set(nodes)) > 5
    noise = np.asarray(noise_at(POSITION[np.arange(ROWS), np.array(nodes)]))
    with np.errstate(divide="ignore"):
        want = np.argmax(np.log(p[np.arange(ROWS), nodes]) + noise, axis=1)
    np.testing.assert_array_equal(verdict.token, want)


def test_it_accepts_more_where_the_target_is_unsure():
    flat, sharp = np.zeros(VOCABULARY), np.array([5.0] + [2.2] * (VOCABULARY - 1))
    accepted = []
    for logits in (flat, sharp):
        rows = jnp.asarray(np.broadcast_to(logits, LOGITS.shape), jnp.float32)
        accepted.append(int(np.sum(np.asarray(verify(jnp.array([0.09, 0.3], jnp.float32), rows).node) > 0)))
    # Every token of the flat distribution has 1/11, above min(0.09, 0.3/11); of the sharp one only token 0 passes.
    assert accepted[0] > 100 and 0 < accepted[1] < accepted[0]


def test_equally_long_paths_are_chosen_by_likelihood():
    parents = (-1, 0, 0, 0)
    logprobs = np.log(np.array([0.2, 0.5, 0.3], np.float32))
    proposal = fixed_proposal(Tree.fixed(parents), jnp.array([[0, 0, 2, 1]]), jnp.ones((1, 4), bool))
    logits = jnp.asarray(np.broadcast_to(logprobs, (1, 4, 3)))
    position = jnp.array([[1, 2, 2, 2]])
    assert TypicalAcceptance().verify(proposal, logits, NodeRandom(SEED[:1], position, 1)).node[0] == 3


def test_turned_off_it_is_plain_decoding():
    logits = jnp.asarray(LOGITS, jnp.float32)
    off = TypicalAcceptance(epsilon=1.0, delta=float("inf"))
    verdict = verify(jnp.array([off.epsilon, off.delta], jnp.float32), logits)
    np.testing.assert_array_equal(verdict.node, 0)
    np.testing.assert_array_equal(verdict.token, np.argmax(np.asarray(logits[:, 0] + noise_at(POSITION[:, 0])), axis=1))


def test_it_is_marked_lossy_and_refuses_meaningless_settings():
    assert not TypicalAcceptance.lossless and "Lossy" in typical_acceptance.__doc__
    for epsilon in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="epsilon must be above 0 and at most 1"):
            TypicalAcceptance(epsilon=epsilon)
    for delta in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"delta must be above 0.*0\.2"):
            TypicalAcceptance(epsilon=0.04, delta=delta)
