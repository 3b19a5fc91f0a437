"""Every verifier keeps the contract, for each way in which the children that it supports are found.

Many rows of one shape, drafted in NumPy: the next token follows from the last one by a table of the target, P, and a
draft token by a table of the draft, Q, both [V, V]. So the distribution of every emitted token is known.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from decodax.decoding import Sampling, speculative
from decodax.decoding.drafters import Children, Drafter, fixed_proposal
from decodax.decoding.logits_processors import History
from decodax.decoding.sampling import choose
from decodax.decoding.tree import Tree, expansion
from decodax.decoding.verifiers import METHODS as OURS
from decodax.decoding.verifiers import NodeRandom, TreeRejection, Verifier
from decodax.models.model import Model
from tests.contracts.outside import with_outside
from tests.tiny import tiny_config

RULES = {name: method() for name, method in with_outside(OURS, "verifiers").items()}
ROWS, VOCABULARY = 10_007, 7
CHAIN, TREE = expansion((1, 1)), expansion((3, 2))
CASES = [
    pytest.param(name, children, id=f"{name}, {children.value}")
    for name, rule in RULES.items()
    for children in sorted(rule.supported_children, key=lambda children: children.value)
]
each_case = pytest.mark.parametrize(("name", "children"), CASES)
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
SEED = np.arange(ROWS, dtype=np.uint32) + 5


def log(probability):
    with np.errstate(divide="ignore"):
        return np.log(probability)


def tables():
    """P, and Q from a rough likeness of P to one that is nearly certain of a token that P may forbid."""
    random = np.random.default_rng(0)
    shape = (VOCABULARY, VOCABULARY)
    p = np.exp(1.5 * random.normal(size=shape)) * (random.random(shape) > 0.2)
    p[:, 0] += 1e-2
    rough = (p + 0.1) * np.exp(random.normal(size=shape))
    zeros = np.exp(random.normal(size=shape))
    zeros[:, [1, 4, 6]] = 0
    peaked = np.full(shape, 1e-6)
    peaked[np.arange(VOCABULARY), random.permutation(VOCABULARY)] = 1
    p, rough, zeros, peaked = (table / table.sum(axis=1, keepdims=True) for table in (p, rough, zeros, peaked))
    return p, {"rough": rough, "zeros": zeros, "peaked": peaked}


P, Q = tables()


@dataclass(frozen=True, eq=False)
class Drafts:
    """Draft tokens of all rows, in NumPy; `logprobs` as in a proposal."""

    parents: tuple[int, ...]
    token: np.ndarray
    is_candidate: np.ndarray
    logprobs: np.ndarray | None

    @property
    def proposal(self):
        logprobs = None if self.logprobs is None else jnp.asarray(self.logprobs, jnp.float32)
        tree, arrays = Tree.fixed(self.parents), (jnp.asarray(self.token), jnp.asarray(self.is_candidate))
        return fixed_proposal(tree, *arrays, logprobs=logprobs)

    def rows(self, rows):
        logprobs = None if self.logprobs is None else self.logprobs[rows]
        return Drafts(self.parents, self.token[rows], self.is_candidate[rows], logprobs)


@cache
def drafts(children, parents, table):
    """Children of every node drawn from the table's distribution after it; a tenth of the siblings end early."""
    random = np.random.default_rng(len(parents))
    token = np.tile((np.arange(ROWS, dtype=np.int32) % VOCABULARY)[:, None], (1, len(parents)))
    is_candidate = np.zeros(token.shape, bool)
    for node in range(len(parents)):
        own = np.flatnonzero(np.array(parents) == node)
        scores = np.broadcast_to(log(Q[table])[token[:, node]][:, None], (ROWS, len(own), VOCABULARY))
        if children is Children.INDEPENDENT:
            drawn = np.argmax(scores + random.gumbel(size=scores.shape), axis=2)
            best = np.zeros(drawn.shape)
        elif len(own):
            noise = random.gumbel(size=(ROWS, VOCABULARY)) if children is Children.WITHOUT_REPLACEMENT else 0
            drawn = np.argsort(-(scores[:, 0] + noise), axis=1, kind="stable")[:, : len(own)]
            best = np.take_along_axis(scores[:, 0], drawn, axis=1)  # -inf where no token is left
        if len(own):
            token[:, own] = drawn
            # Of siblings only the last may be missing, as later ones were drawn with it left out.
            kept = np.isfinite(best) & (random.random(drawn.shape) < 0.9)
            is_candidate[:, own] = np.cumprod(kept, axis=1)
    return Drafts(parents, token, is_candidate, None if children is Children.CHOSEN else log(Q[table])[token])


def parents_for(rule):
    return CHAIN if rule.only_chains else TREE


def target_logits(drafted):
    return jnp.asarray(log(P)[drafted.token], jnp.float32)


def positions(parents, rows=slice(None)):
    """Of the token after each node; rows are at different positions."""
    return jnp.asarray(Tree.fixed(parents).depth + (3 + np.arange(ROWS) % 50)[rows, None], jnp.int32)


@partial(jax.jit, static_argnums=0)
def _verify(rule, proposal, logits, rng):
    return rule.verify_greedy(proposal, logits) if rng is None else rule.verify(proposal, logits, rng)


def verify(rule, drafted, logits, do_sample=True, rows=slice(None)):
    """Node and token of the verdict, in NumPy."""
    depth = int(Tree.fixed(drafted.parents).depth.max())
    rng = NodeRandom(jnp.asarray(SEED[rows]), positions(drafted.parents, rows), depth) if do_sample else None
    verdict = _verify(rule, drafted.proposal, logits, rng)
    return np.asarray(verdict.node), np.asarray(verdict.token)


def emitted(drafted, node, token):
    """How many draft tokens each row accepted, and what it emits: those and the token after them, then -1."""
    depth = Tree.fixed(drafted.parents).depth[0]
    count = depth[node]
    tokens = np.full((len(node), depth.max() + 1), -1)
    tokens[np.arange(len(node)), count] = token
    for row_depth in range(depth.max(), 0, -1):
        is_there = depth[node] == row_depth
        tokens[is_there, row_depth - 1] = drafted.token[is_there, node[is_there]]
        node = np.where(is_there, np.array(drafted.parents)[node], node)
    return count, tokens


def p_value(before, after):
    """Of the tokens `after`, given those `before` them, under the target; 0 where one is impossible. Chi-square."""
    statistic, degrees = 0.0, 0
    for token in np.unique(before):
        counts = np.bincount(after[before == token], minlength=VOCABULARY)
        expected = P[token] * counts.sum()
        if counts[expected == 0].any():
            return 0.0
        rare = expected < 5  # too few for the chi-square distribution: one cell together
        cells = [np.append(array[~rare], array[rare].sum()) for array in (counts, expected)]
        cells = [array[cells[1] > 0] for array in cells]
        statistic += np.sum((cells[0] - cells[1]) ** 2 / cells[1])
        degrees += len(cells[0]) - 1
    return scipy.stats.chi2.sf(statistic, degrees)


def p_values(rule, children):
    """Over all tables, of the first emitted token and of each after an accepted draft token; and accepted lengths."""
    found, lengths = [], np.zeros(3, int)
    for table in Q:
        drafted = drafts(children, parents_for(rule), table)
        count, tokens = emitted(drafted, *verify(rule, drafted, target_logits(drafted)))
        lengths += np.bincount(count, minlength=3)
        texts = np.concatenate([drafted.token[:, :1], tokens], axis=1)
        for place, (before, after) in enumerate(pairwise(texts.T)):
            there = count >= place
            found.append(p_value(before[there], after[there]))
    return found, lengths


@each_case
def test_tokens_have_the_distribution_of_the_target_where_the_verifier_is_lossless(name, children):
    rule = RULES[name]
    found, lengths = p_values(rule, children)
    assert np.all(lengths > ROWS / 100)  # none to all of a draft was accepted
    # The draws are fixed, so this passes always or never. There are 126 numbers.
    assert min(found) > 1e-4 if rule.lossless else min(found) < 1e-9


class TargetAfterRejection(TreeRejection):
    """Wrong: after a rejection the token is drawn from p and not from the residual distribution."""

    def reject(self, target_probs, logprobs, token):
        return target_probs, logprobs


@pytest.mark.parametrize(
    ("rule", "children"),
    [
        (TargetAfterRejection(), Children.INDEPENDENT),
        (TreeRejection(), Children.WITHOUT_REPLACEMENT),  # as if they were independent
    ],
)
def test_wrong_rules_are_found(rule, children):
    assert min(p_values(rule, children)[0]) < 1e-9


def argmax_path(drafted, rows):
    """How many draft tokens of each row are the most probable ones, and the most probable tokens after the root."""
    best = np.argmax(P, axis=1)
    token, parents = drafted.token[rows], np.array(drafted.parents)
    is_reached = np.ones(token.shape, bool)
    for node in range(1, len(parents)):
        follows = token[:, node] == best[token[:, parents[node]]]
        is_reached[:, node] = is_reached[:, parents[node]] & drafted.is_candidate[rows, node] & follows
    depth = Tree.fixed(drafted.parents).depth[0]
    path = [token[:, 0]]
    for _ in range(depth.max() + 1):
        path.append(best[path[-1]])
    return np.max(np.where(is_reached, depth, 0), axis=1), np.stack(path[1:], axis=1)


def assert_argmax_path(drafted, found, rows=slice(None)):
    count, tokens = emitted(drafted, *found)
    want, path = argmax_path(drafted, rows)
    assert len(np.unique(want)) > 2  # none to all
    np.testing.assert_array_equal(count[rows], want)
    is_there = np.arange(tokens.shape[1]) <= want[:, None]
    np.testing.assert_array_equal(tokens[rows], np.where(is_there, path, -1))


@each_case
def test_greedy_rows_accept_exactly_the_most_probable_tokens(name, children):
    """Where every row is greedy nothing is drawn."""
    rule = RULES[name]
    drafted = drafts(children, parents_for(rule), "rough")
    logits = target_logits(drafted)
    assert_argmax_path(drafted, verify(rule, drafted, logits, do_sample=False))
    code = str(jax.make_jaxpr(rule.verify_greedy)(drafted.proposal, logits))
    assert "random" not in code and "while" not in code


@each_case
def test_greedy_rows_beside_sampled_ones_do_so_too(name, children):
    """The distributions of target and draft are one token each there: the draft's is the first child of a node."""
    rule = RULES[name]
    drafted = drafts(children, parents_for(rule), "rough")
    is_greedy = np.arange(ROWS) % 2 == 0
    parents, node = drafted.parents, np.arange(len(drafted.parents))
    first = np.array([parents.index(own) if own in parents else 0 for own in node])
    is_first = np.isin(node, first)
    one_token = np.where(np.arange(VOCABULARY) == drafted.token[:, first, None], 0, -np.inf)
    mixed = dataclasses.replace(
        drafted,
        is_candidate=drafted.is_candidate & (is_first | ~is_greedy[:, None]),
        logprobs=None if drafted.logprobs is None else np.where(is_greedy[:, None, None], one_token, drafted.logprobs),
    )
    certain = log(np.arange(VOCABULARY) == np.argmax(P, axis=1)[drafted.token][..., None])
    logits = jnp.where(is_greedy[:, None, None], jnp.asarray(certain, jnp.float32), target_logits(drafted))
    assert_argmax_path(mixed, verify(rule, mixed, logits), is_greedy)


@each_case
def test_what_is_no_candidate_is_never_accepted(name, children):
    """The target's distributions are the draft's, so that every token would be accepted often."""
    rule = RULES[name]
    drafted = drafts(children, parents_for(rule), "rough")
    node, _ = verify(rule, drafted, jnp.asarray(log(Q["rough"])[drafted.token], jnp.float32))
    is_above = Tree.fixed(drafted.parents).ancestors[0][node]
    is_above[:, 0] = False
    assert np.all(drafted.is_candidate | ~is_above)
    assert np.any(~drafted.is_candidate[:, 1:]) and np.any(node > 0)


@each_case
def test_where_nothing_is_drafted_the_token_is_plain_decoding_s(name, children):
    rule = RULES[name]
    drafted = drafts(children, parents_for(rule), "rough")
    logits = target_logits(drafted)
    node, token = verify(rule, dataclasses.replace(drafted, is_candidate=drafted.is_candidate & False), logits)
    np.testing.assert_array_equal(node, 0)
    np.testing.assert_array_equal(token, plain_tokens(logits[:, 0], positions(drafted.parents)[:, 0]))


@jax.jit
def plain_tokens(logits, position):
    history = History(None, None, jnp.zeros(ROWS, jnp.int32))
    return choose(Sampling.create(1, VOCABULARY, temperature=1.0), logits, history, jnp.asarray(SEED), position)


@each_case
def test_a_row_alone_is_the_row_in_the_batch(name, children):
    rule = RULES[name]
    drafted = drafts(children, parents_for(rule), "rough")
    logits = target_logits(drafted)
    node, token = verify(rule, drafted, logits)
    for row in range(0, 7):
        rows = slice(row, row + 1)
        alone = verify(rule, drafted.rows(rows), logits[rows], rows=rows)
        assert (alone[0][0], alone[1][0]) == (node[row], token[row])


@each_case
def test_a_row_that_is_not_finite_changes_no_other(name, children):
    rule = RULES[name]
    drafted = drafts(children, parents_for(rule), "rough")
    logits = target_logits(drafted)
    want, got = verify(rule, drafted, logits), verify(rule, drafted, logits.at[1].set(jnp.nan))
    for mine, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.delete(mine, 1), np.delete(other, 1))
    assert got[0][1] == 0 and 0 <= got[1][1] < VOCABULARY


@dataclass(frozen=True)
class Stub(Drafter):
    """A drafter that never drafts."""

    num_nodes: int
    max_depth: int
    children: Children


@each_rule
def test_a_pair_is_refused_where_the_rule_does_not_hold(rule):
    rule_name, model = type(rule).__name__, Model(tiny_config())
    for children in Children:
        chain, tree = Stub(3, 2, children), Stub(4, 2, children)
        if children not in rule.supported_children:
            with pytest.raises(
                ValueError, match=rf"{rule_name} preserves .* those of Stub are {children.value}: choose"
            ):
                speculative(model, chain, rule)
            continue
        speculative(model, chain, rule)
        if rule.only_chains:
            with pytest.raises(ValueError, match=f"{rule_name} verifies chains, and Stub drafts a tree of 4 nodes"):
                speculative(model, tree, rule)
        else:
            speculative(model, tree, rule)


@each_rule
def test_it_is_frozen_and_hashable(rule):
    again = type(rule)()
    assert isinstance(rule, Verifier)
    assert rule == again and hash(rule) == hash(again)  # one compiled program serves both
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.lossless = not rule.lossless
