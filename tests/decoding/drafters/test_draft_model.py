"""The draft model: its tokens follow its distribution at each node, and its cache holds the accepted tokens only."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from decodax import decoding
from decodax.decoding.drafters import Children, DraftModel
from decodax.decoding.logits_processors import History
from decodax.decoding.sampling import processed_logits
from decodax.decoding.tree import expansion
from decodax.decoding.verifiers import ExactMatch
from tests.speculation import DRAFT_PARAMS, MODEL, NEW, PARAMS, VOCABULARY, forward, padded, plain, start, texts
from tests.tiny import tiny_model

# Keys, values and logits of at most 5 in float32, summed in an order that depends on how many tokens run at once.
TOLERANCE = 2e-5


class Watched(DraftModel):
    """A draft model that remembers its last proposal."""

    def start(self, params, draft_params, state):
        state = dataclasses.replace(state, draft=super().start(params, draft_params, state))
        shapes = jax.eval_shape(lambda: self.remembered(super(Watched, self).propose(params, draft_params, state)[0]))
        return state.draft, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def propose(self, params, draft_params, state):
        proposal, draft = super().propose(params, draft_params, dataclasses.replace(state, draft=state.draft[0]))
        return proposal, (draft, self.remembered(proposal))

    def update(self, params, draft_params, state, outcome):
        draft, remembered = state.draft
        return super().update(params, draft_params, dataclasses.replace(state, draft=draft), outcome), remembered

    @staticmethod
    def remembered(proposal):
        return proposal.token, proposal.is_candidate, proposal.logprobs


TOP_TOKENS = Watched(MODEL, (-1, 0, 0, 1, 1, 2), Children.CHOSEN)
DRAWN = Watched(MODEL, expansion((2, 1)), Children.WITHOUT_REPLACEMENT)
KINDS = {"top tokens": (TOP_TOKENS, "greedy"), "drawn": (DRAWN, "every option")}


@cache
def compiled(drafter):
    """Start and loop."""
    speculative = decoding.speculative(MODEL, drafter, ExactMatch())
    return jax.jit(speculative.start), jax.jit(speculative, donate_argnums=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick_cases(1)
def test_its_cache_holds_the_accepted_tokens(kind):
    """After every round: keys and values of the accepted tokens, as a plain run over the text gives them; nothing else.

    The last token is never in it, and the one before it is missing after an accepted leaf.
    """
    drafter, options = KINDS[kind]
    begin, decode = compiled(drafter)
    state, lacking = begin(PARAMS, DRAFT_PARAMS, start(options=options)), set()
    while not np.asarray(state.done).all():
        for row, text in enumerate(texts(state)):
            held = int(state.draft[0][0].length[row])
            lacking |= {(len(text) - held, row)}
            out, _ = forward(DRAFT_PARAMS, padded([text]))
            for cache_, want in zip(state.draft[0], out.cache_updates, strict=True):
                assert cache_.length[row] == held
                for mine, wanted in ((cache_.key, want.key), (cache_.value, want.value)):
                    np.testing.assert_allclose(mine[row, :, :held], wanted[0, :, :held], atol=TOLERANCE)
                    assert not np.asarray(mine[row, :, held:]).any()
        state = decode(PARAMS, DRAFT_PARAMS, state, 1)
    assert {short for short, _ in lacking} == {1, 2}
    assert np.asarray(state.counts.accepted_lengths).all()  # none to all accepted
    np.testing.assert_array_equal(state.tokens, plain(options).tokens)


def test_a_draft_that_is_the_target_is_fully_accepted():
    begin, decode = compiled(TOP_TOKENS)
    state = decode(PARAMS, PARAMS, begin(PARAMS, PARAMS, start()), 1000)
    rounds = -(-NEW // 3)  # a tree of depth 2, and one token of the target's own
    np.testing.assert_array_equal(state.counts.accepted, state.counts.proposed)
    assert int(state.num_target_forwards) == rounds.max() + 1
    want = np.bincount([*(NEW - 3 * rounds + 2), *[2] * int((rounds - 1).sum())], minlength=3)
    np.testing.assert_array_equal(state.counts.accepted_lengths, want)


def paths_of(parents):
    paths = [[0]]
    for node, parent in enumerate(parents[1:], start=1):
        paths.append([*paths[parent], node])
    return paths


def distributions_along(state, token, parents):
    """The draft's distribution at every node from a run over each node's path: Float[B, C, V], log-probabilities."""
    distributions = np.zeros((*token.shape, VOCABULARY))
    for row, text in enumerate(texts(state)):
        paths = [np.concatenate([text[:-1], token[row, path]]) for path in paths_of(parents)]
        _, logits = forward(DRAFT_PARAMS, padded(paths))
        for node, path in enumerate(paths):
            at = np.array([len(path) - 1])
            alone = lambda leaf, row=row: leaf[row : row + 1] if leaf.shape[0] == 3 else leaf
            sampling, history = jax.tree.map(alone, (state.sampling, state.history))
            new = path[len(text) :]
            if history.output_counts is not None:
                counts = history.output_counts.at[0, jnp.asarray(new, jnp.int32)].add(1)
                history = History(history.prompt_counts, counts, history.num_new_tokens + len(new))
            distributions[row, node] = jax.nn.log_softmax(processed_logits(sampling, logits[node, at], history)[0])
    return distributions


def proposed(drafter, options):
    """A state whose cache lacks one token of some rows and two of others, and its proposal."""
    begin, decode = compiled(drafter)
    state, lacking = begin(PARAMS, DRAFT_PARAMS, start(options=options)), set()
    while lacking != {1, 2}:
        state = decode(PARAMS, DRAFT_PARAMS, state, 1)
        lacking = set((np.asarray(state.length) - np.asarray(state.draft[0][0].length)).tolist())
    before = jax.tree.map(jnp.copy, state)  # the loop overwrites its argument
    return before, [np.asarray(x) for x in decode(PARAMS, DRAFT_PARAMS, state, 1).draft[1] if x is not None]


def test_the_most_probable_tokens_of_every_node():
    """Children are the tokens of the largest logits that a run over the path gives, in order."""
    state, (token, is_candidate) = proposed(TOP_TOKENS, "greedy")  # and no distribution
    distributions = distributions_along(state, token, TOP_TOKENS.parents)
    np.testing.assert_array_equal(token[:, 0], state.last_token())
    for node in range(TOP_TOKENS.num_nodes):
        children = np.flatnonzero(np.array(TOP_TOKENS.parents) == node)
        want = np.argsort(-distributions[:, node], axis=1)[:, : len(children)]
        np.testing.assert_array_equal(token[:, children], want)
    np.testing.assert_array_equal(is_candidate, np.broadcast_to(np.arange(6) > 0, (3, 6)))


def test_the_distribution_at_every_node():
    """With every sampling option: exactly the distribution of a run over the path, as if it had been written."""
    state, (token, is_candidate, logprobs) = proposed(DRAWN, "every option")
    distributions = distributions_along(state, token, DRAWN.parents)
    for node in set(DRAWN.parents) - {-1}:
        got, want = np.exp(logprobs[:, node]), np.exp(distributions[:, node])
        np.testing.assert_allclose(got, want, atol=TOLERANCE)
        np.testing.assert_array_equal(got > 0, want > 0)
    drawn_from = np.take_along_axis(logprobs[:, np.maximum(DRAWN.parents, 0)], token[..., None], axis=2)[..., 0]
    assert np.isfinite(drawn_from[is_candidate]).all()
    # The first row is greedy: one token holds all the probability, so it has no second child.
    np.testing.assert_array_equal(is_candidate[0, :4], [False, True, False, True])


DRAWS = 4000
SMALL, SMALL_PARAMS = tiny_model(vocab_size=5)


@pytest.mark.parametrize("kind", [Children.WITHOUT_REPLACEMENT, Children.INDEPENDENT])
@pytest.mark.quick_cases(1)
def test_pairs_of_children_follow_the_distribution(kind):
    """Over 4,000 seeds: each pair (first, second child) as often as the sequential distribution says."""
    drafter = DraftModel(SMALL, (-1, 0, 0), kind)
    sampling = decoding.Sampling.create(DRAWS, 5, temperature=2.0)
    prompts = np.broadcast_to(np.array([[1, 4, 2]]), (DRAWS, 3))
    state = decoding.prefill(SMALL, SMALL_PARAMS, prompts, np.full(DRAWS, 3), 5, np.arange(DRAWS), sampling=sampling)
    state = decoding.speculative(SMALL, drafter, ExactMatch()).start(SMALL_PARAMS, SMALL_PARAMS, state)
    proposal, _ = jax.jit(drafter.propose)(SMALL_PARAMS, SMALL_PARAMS, state)
    probs = np.exp(np.asarray(proposal.logprobs[0, 0], np.float64))
    rest = probs[None, :] / (1 - probs[:, None]) * (1 - np.eye(5))
    second = probs[None, :] if kind is Children.INDEPENDENT else rest
    expected = probs[:, None] * second * DRAWS
    counts = np.zeros((5, 5))
    np.add.at(counts, (np.asarray(proposal.token[:, 1]), np.asarray(proposal.token[:, 2])), 1)
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert expected.min() > 5  # where chi-square holds
    assert scipy.stats.chisquare(counts, expected * DRAWS / expected.sum()).pvalue > 1e-4


def test_other_shapes_of_draft():
    """One layer, other widths, one token deep: shapes only."""
    small = dataclasses.replace(MODEL.config, blocks=MODEL.config.blocks[1:], hidden_size=17)
    model = type(MODEL)(small)
    for drafter in (DraftModel.chain(model, 1), DraftModel.top_k(model, expansion((3,)))):
        params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
        speculative = decoding.speculative(MODEL, drafter, ExactMatch())
        state = jax.eval_shape(speculative, PARAMS, params, start())
        assert state.counts.proposed.shape == (1,) and len(state.draft) == 1


def test_bad_input():
    with pytest.raises(ValueError, match="a draft must hold at least 1 token, got 0"):
        DraftModel.chain(MODEL, 0)
    for absurd in (DraftModel.chain, lambda model, size: DraftModel(model, tuple(range(-1, size)))):
        with pytest.raises(ValueError, match="a draft must hold at most 1024 tokens, got 100000"):
            absurd(MODEL, 10**5)
    with pytest.raises(ValueError, match="at least 1 token, got 0: for none, use the strategy 'autoregressive'"):
        DraftModel(MODEL, (-1,))
    with pytest.raises(ValueError, match="parents must precede their children: node 1"):
        DraftModel(MODEL, (-1, 2, 0))
    with pytest.raises(ValueError, match=r"the target's vocabulary of 37 tokens, got 5: .*train one with"):
        decoding.speculative(MODEL, DraftModel.chain(SMALL, 2), ExactMatch())(PARAMS, SMALL_PARAMS, start())
