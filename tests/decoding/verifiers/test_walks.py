"""With given random numbers every rejection rule walks the tree as a plain float64 loop does, in every row."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.decoding.drafters import Children, fixed_proposal
from decodax.decoding.random import Draw, draw_keys, gumbel
from decodax.decoding.tree import Tree
from decodax.decoding.verifiers import (
    ChainRejection,
    DeterministicTree,
    NodeRandom,
    TreeRejection,
    TreeRejectionWithoutReplacement,
)
from decodax.decoding.verifiers._walk import walk
from decodax.decoding.verifiers.chain_rejection import judge
from tests.oracles import verification as oracle

ROWS, VOCABULARY = 241, 7
CHAIN = (-1, 0, 1, 2, 3)
TREE = (-1, 0, 0, 1, 0, 2, 1, 2, 4, 1, 4)
CASES = {
    "chain, drawn": (ChainRejection(), Children.INDEPENDENT, CHAIN),
    "chain, chosen": (ChainRejection(), Children.CHOSEN, CHAIN),
    "independent": (TreeRejection(), Children.INDEPENDENT, TREE),
    "without replacement": (TreeRejectionWithoutReplacement(), Children.WITHOUT_REPLACEMENT, TREE),
    "chosen": (DeterministicTree(), Children.CHOSEN, TREE),
}


def log(probability):
    with np.errstate(divide="ignore"):
        return np.log(probability)


@cache
def drafts(kind, parents, num_rows=ROWS):
    """Random distributions p and q, and children of every node drawn from q; a few nodes hold no draft. All float64."""
    random = np.random.default_rng(len(parents))
    shape = (num_rows, len(parents), VOCABULARY)
    p = np.exp(1.5 * random.normal(size=shape)) * (random.random(shape) > 0.2)
    p[..., 0] += 1e-3
    q = np.exp(np.log(p + 0.01) + random.normal(size=shape))
    q /= q.sum(axis=2, keepdims=True)
    p /= p.sum(axis=2, keepdims=True)
    token = np.zeros(shape[:2], np.int32)
    for row in range(num_rows):
        for node in range(len(parents)):
            children = np.flatnonzero(np.array(parents) == node)
            replace = kind is Children.INDEPENDENT
            if kind is Children.CHOSEN:
                drawn = np.argsort(-q[row, node])[: len(children)]
            else:
                drawn = random.choice(VOCABULARY, len(children), replace=replace, p=q[row, node])
            token[row, children] = drawn
    is_candidate = random.random(shape[:2]) < 0.9
    is_candidate[:, 0] = False
    if kind is Children.WITHOUT_REPLACEMENT:
        # Of siblings only the last may be missing, as later ones were drawn with it left out.
        for node in range(len(parents)):
            children = np.flatnonzero(np.array(parents) == node)
            is_candidate[:, children] = np.cumprod(is_candidate[:, children], axis=1)
    return p, q, token, is_candidate


def proposal_of(kind, parents, rows=slice(None)):
    p, q, token, is_candidate = (array[rows] for array in drafts(kind, parents))
    logprobs = None if kind is Children.CHOSEN else jnp.asarray(log(q), jnp.float32)
    proposal = fixed_proposal(Tree.fixed(parents), jnp.asarray(token), jnp.asarray(is_candidate), logprobs=logprobs)
    return proposal, jnp.asarray(log(p), jnp.float32)


def positions(parents, rows):
    """Rows at different positions."""
    return jnp.asarray(Tree.fixed(parents).depth + np.arange(3, 3 + ROWS)[rows, None], jnp.int32)


SEED = jnp.arange(ROWS, dtype=jnp.uint32) + 5
uniform_numbers = jax.jit(NodeRandom.uniform)
sample_tokens = jax.jit(NodeRandom.sample)


@jax.jit
def noise_at(position):
    return gumbel(draw_keys(SEED, position, Draw.TOKEN), (VOCABULARY,))


@partial(jax.jit, static_argnums=0)
def end(rule, proposal, logits, uniform):
    if isinstance(rule, ChainRejection):
        return judge(proposal, logits, uniform)
    return walk(rule, proposal, logits, uniform)[:2]


@partial(jax.jit, static_argnums=0)
def verify(rule, proposal, logits, rng):
    return rule.verify(proposal, logits, rng)


def assert_same(got, want, rows=slice(None)):
    for field in ("node", "token"):
        np.testing.assert_array_equal(np.asarray(getattr(got, field))[rows], np.asarray(getattr(want, field))[rows])


@pytest.mark.parametrize("name", [*CASES, "independent, a chain"])
def test_the_walk_and_the_distribution_after_it(name):
    rule, kind, parents = (CASES | {"independent, a chain": (TreeRejection(), Children.INDEPENDENT, CHAIN)})[name]
    uniform = np.random.default_rng(9).random((ROWS, len(parents))).astype(np.float32)
    node, probs = end(rule, *proposal_of(kind, parents), jnp.asarray(uniform))
    p, q, token, is_candidate = drafts(kind, parents)
    for row in range(ROWS):
        want, want_probs, margin, smallest = oracle.walk(
            parents, token[row], is_candidate[row], p[row], q[row], uniform[row], kind.value
        )
        # Distributions are good to 1e-6 in float32 (logarithms up to 10, rounded at 6e-8), a difference of
        # distributions that sums to `smallest` to 1e-6 over that. The seed has no row nearer to a threshold.
        error = 1e-6 / smallest
        assert margin > error
        assert node[row] == want
        np.testing.assert_allclose(probs[row], want_probs, atol=error)
        np.testing.assert_array_equal(np.asarray(probs[row])[p[row, want] == 0], 0)
    depths = Tree.fixed(parents).depth[0][np.asarray(node)]
    assert set(depths.tolist()) == set(range(max(Tree.fixed(parents).depth[0]) + 1))


@pytest.mark.parametrize("name", CASES)
def test_the_token_after_the_path_is_drawn_with_the_noise_of_its_position(name):
    rule, kind, parents = CASES[name]
    proposal, logits = proposal_of(kind, parents)
    position = positions(parents, slice(None))
    rng = NodeRandom(SEED, position, 4)
    verdict = verify(rule, proposal, logits, rng)
    node, probs = end(rule, proposal, logits, uniform_numbers(rng))
    np.testing.assert_array_equal(verdict.node, node)
    after_node = jnp.asarray(np.asarray(position)[np.arange(ROWS), np.asarray(node)])
    noise = np.asarray(noise_at(after_node))
    np.testing.assert_array_equal(verdict.token, np.argmax(log(np.asarray(probs)) + noise, axis=1))


def test_acceptance_draws_are_uniform_and_independent():
    position = positions(TREE, slice(None))
    uniform = np.asarray(uniform_numbers(NodeRandom(SEED, position, 3)))
    assert uniform.dtype == np.float32 and uniform.min() >= 0 and uniform.max() < 1
    assert len(np.unique(uniform)) > 0.999 * uniform.size
    # 2,651 numbers in ten bins; the largest correlation of 55 pairs of columns of 241 is below 4 / sqrt(241).
    counts = np.histogram(uniform, 10, (0, 1))[0]
    assert np.square(counts - uniform.size / 10).sum() / (uniform.size / 10) < 27.9  # chi-square, 9 degrees, 0.001
    assert np.abs(np.corrcoef(uniform.T) - np.eye(len(TREE))).max() < 4 / np.sqrt(ROWS)
    # A draw is defined by the row's seed, the node's own position, the kind of draw, and the node's number.
    key = draw_keys(SEED[:1], position[:1, TREE[9]], Draw.ACCEPT)[0]
    bits = jax.random.bits(jax.random.fold_in(key, 9), (), jnp.uint32)
    assert uniform[0, 9] == int(bits >> 8) / 2**24
    # A node's draw depends on its own position and row.
    moved = np.asarray(uniform_numbers(NodeRandom(SEED, position.at[7, 4].add(1), 3)))
    np.testing.assert_array_equal(np.argwhere(moved != uniform), [[7, 4]])


@pytest.mark.parametrize("parents", [CHAIN, TREE, (-1, 0, 0, 1)], ids=["chain", "tree", "as deep as a chain may be"])
def test_a_sampled_node_has_the_noise_of_its_position(parents):
    """Whatever the depth that a drafter promises; a chain says that it is one."""
    tree, position = Tree.fixed(parents), positions(parents, slice(None))
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(*position.shape, VOCABULARY)), jnp.float32)
    deepest = int(tree.depth.max())
    for max_depth in (deepest, len(parents) - 1, len(parents) + 3):
        is_chain = tree.is_chain and max_depth == deepest
        tokens = sample_tokens(NodeRandom(SEED, position, max_depth, is_chain), logits)
        for node in range(len(parents)):
            want = np.argmax(np.asarray(logits)[:, node] + np.asarray(noise_at(position[:, node])), axis=1)
            np.testing.assert_array_equal(tokens[:, node], want)


@pytest.mark.parametrize("name", ["chain, drawn", "without replacement"])
@pytest.mark.quick_cases(1)
def test_eager_calls_decide_the_same(name):
    rule, kind, parents = CASES[name]
    arguments = *proposal_of(kind, parents), NodeRandom(SEED, positions(parents, slice(None)), 4)
    assert_same(rule.verify(*arguments), verify(rule, *arguments))


@pytest.mark.parametrize("name", ["chain, drawn", "without replacement"])
def test_a_tree_of_the_root_alone_gives_the_token_of_plain_decoding(name):
    rule, kind, parents = CASES[name]
    proposal, logits = proposal_of(kind, parents)
    position, is_candidate = positions(parents, slice(None))[:, :1], jnp.zeros((ROWS, 1), bool)
    root = fixed_proposal(Tree.fixed([-1]), proposal.token[:, :1], is_candidate, logprobs=proposal.logprobs[:, :1])
    verdict = verify(rule, root, logits[:, :1], NodeRandom(SEED, position, 0))
    np.testing.assert_array_equal(verdict.node, 0)
    np.testing.assert_array_equal(verdict.token, np.argmax(np.asarray(logits[:, 0] + noise_at(position[:, 0])), axis=1))


@pytest.mark.parametrize("name", ["chain, drawn", "independent"])
def test_a_draft_that_is_the_target_is_always_accepted(name):
    rule, kind, parents = CASES[name]
    proposal, _ = proposal_of(kind, parents)
    every = jnp.ones(proposal.token.shape, bool).at[:, 0].set(False)
    same = dataclasses.replace(proposal, is_candidate=every)
    verdict = verify(rule, same, proposal.logprobs, NodeRandom(SEED, positions(parents, slice(None)), 4))
    first_leaf = {CHAIN: 4, TREE: 3}[parents]  # the first child of the first child ...
    np.testing.assert_array_equal(verdict.node, first_leaf)
