"""The speculative loop gives plain decoding's output, logprobs and caches, whatever is drafted.

Drafters made for tests run here with exact matching, those of METHODS in `contracts/test_drafters.py`. Plain decoding
itself is tested against full forwards in `test_autoregressive.py`, rejection rules are tested with the verifiers.
"""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import decoding
from decodax.decoding.drafters import Children, Drafter, DraftModel, PromptLookup, Recording, Replay
from decodax.decoding.verifiers import ExactMatch
from decodax.models.model import Model
from tests.odd_drafters import RandomTrees, ShallowExit
from tests.speculation import (
    CAPACITY,
    LENGTHS,
    MODEL,
    NEW,
    PARAMS,
    PROMPTS,
    TOLERANCE,
    VOCABULARY,
    assert_same,
    forward,
    padded,
    plain,
    plain_decode,
    start,
    texts,
)

SHALLOW = Model(dataclasses.replace(MODEL.config, blocks=MODEL.config.blocks[:1]))  # the target's own first layer


def recorded_tokens(options="greedy"):
    """Plain decoding's own texts, with 1 token after them, so that drafts reach beyond the end."""
    return jnp.pad(plain(options).tokens, ((0, 0), (0, 1)))


DRAFTERS = {
    "replay": (Replay(4, VOCABULARY), lambda options: Recording.create(recorded_tokens(options), wrong_rate=0.2)),
    "replay of nothing": (
        Replay(0, VOCABULARY),
        lambda options: Recording.create(recorded_tokens(options), wrong_rate=0),
    ),
    "random trees": (RandomTrees(), recorded_tokens),
    "shallow exit": (ShallowExit(), lambda options: None),
}
CASES = [("replay of nothing", "greedy"), ("random trees", "every option"), ("shallow exit", "greedy")]
ALL_TOKENS = 1000


@cache
def compiled(kind):
    """The start and the loop of a drafter, compiled apart, so that all runs in one shape of buffers share them."""
    speculative = decoding.speculative(MODEL, DRAFTERS[kind][0], ExactMatch())
    return jax.jit(speculative.start), jax.jit(speculative, donate_argnums=2)


def begin(kind, options="greedy", *, draft_params=None, rows=slice(None), **changes):
    draft_params = DRAFTERS[kind][1](options) if draft_params is None else draft_params
    state = start(rows, options=options, **changes)
    return compiled(kind)[0](changes.get("params", PARAMS), draft_params, state), draft_params


def run(kind, options="greedy", *, blocks=(ALL_TOKENS,), **changes):
    state, draft_params = begin(kind, options, **changes)
    for max_tokens in blocks:
        state = compiled(kind)[1](changes.get("params", PARAMS), draft_params, state, max_tokens)
    return state


ended = cache(run)


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.quick_cases(2)
def test_equals_plain_decoding(kind, options):
    got, want = ended(kind, options), plain(options)
    assert_same(got, want)
    accepted = np.asarray(got.counts.accepted_lengths)
    if kind == "replay of nothing":
        assert int(got.num_target_forwards) == int(want.num_target_forwards)
    else:  # otherwise nothing was tested
        assert accepted[1:].sum() >= 3 and accepted[0] >= 3
        assert int(got.num_target_forwards) < int(want.num_target_forwards)


def inside_a_block(row):
    """A token that this row alone emits, inside a right draft of 4; and its place."""
    output = [text[length:] for text, length in zip(texts(plain()), LENGTHS, strict=True)]
    elsewhere = {*np.concatenate([prompt[:length] for prompt, length in zip(PROMPTS, LENGTHS, strict=True)])}
    elsewhere |= {token for other in range(3) if other != row for token in output[other]}
    firsts = {int(token): place for place, token in reversed(list(enumerate(output[row]))) if token not in elsewhere}
    return next((place, token) for token, place in sorted(firsts.items()) if place > 5 and place % 5 in (1, 2, 3))


def replayed(output, is_wrong, num_tokens, stops, limit):
    """One row of the replay drafter in plain Python: emitted tokens and counts, round by round."""
    lengths, proposed, accepted = np.zeros(num_tokens + 1, int), np.zeros(num_tokens, int), np.zeros(num_tokens, int)
    emitted = []
    while not emitted or (emitted[-1] not in stops and len(emitted) < limit):
        at, run = len(emitted), 0
        while run < num_tokens and not is_wrong[at + run]:
            proposed[run] += 1
            accepted[run] += 1
            run += 1
        if run < num_tokens:
            proposed[run] += 1
        block = output[at : at + run + 1][: limit - at]
        for index, token in enumerate(block):
            if token in stops:
                block = block[: index + 1]
                break
        emitted += list(block)
        lengths[len(block) - 1] += 1
    return emitted, (lengths, proposed, accepted), int(lengths.sum())


@pytest.mark.parametrize("wrong_rate", [0.0, 0.3])
def test_stops_and_limits_inside_an_accepted_block(wrong_rate):
    """Tokens after a stop or a limit are dropped and not committed; counted exactly."""
    output = [text[length:] for text, length in zip(texts(plain()), LENGTHS, strict=True)]
    (place, stop), (other_place, other_stop) = (inside_a_block(row) for row in (1, 2))
    stops, limits = (stop, other_stop), np.array([13, 24, 33])
    want = plain_decode(PARAMS, start(new=limits, stop_token_ids=stops))
    recording = Recording.create(np.pad(recorded_tokens(), ((0, 0), (0, 9))), wrong_rate=wrong_rate)
    got = run("replay", draft_params=recording, new=limits, stop_token_ids=stops)
    assert_same(got, want)
    totals, rounds = [np.zeros(5, int), np.zeros(4, int), np.zeros(4, int)], []
    for row in range(3):
        wrong = np.asarray(recording.is_wrong)[row, LENGTHS[row] :]
        emitted, counts, num_rounds = replayed(output[row], wrong, 4, stops, limits[row])
        np.testing.assert_array_equal(texts(got)[row][LENGTHS[row] :], emitted)
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        rounds.append(num_rounds)
    np.testing.assert_array_equal(got.counts.accepted_lengths, totals[0])
    np.testing.assert_array_equal(got.counts.proposed, totals[1])
    np.testing.assert_array_equal(got.counts.accepted, totals[2])
    assert int(got.num_target_forwards) == max(rounds) + 1
    ends = [13, place + 1, other_place + 1]
    np.testing.assert_array_equal(np.asarray(got.length) - LENGTHS, ends)


def test_blocks_give_the_same():
    kind, options = "random trees", "every option"
    got, whole = run(kind, options, blocks=(1, 1, 5, 2, ALL_TOKENS)), ended(kind, options)
    assert_same(got, plain(options))
    for mine, other in zip(jax.tree.leaves(got.counts), jax.tree.leaves(whole.counts), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_blocks_end_after_max_tokens():
    """At the first round in which some row has reached as many, with what that round emitted."""
    recording = Recording.create(recorded_tokens(), wrong_rate=0)
    for max_tokens, gained in ((1, 5), (5, 5), (6, 10)):
        state = run("replay", draft_params=recording, blocks=(max_tokens,))
        np.testing.assert_array_equal(np.asarray(state.length) - LENGTHS, [gained] * 3)


@pytest.mark.slow
def test_jitted_equals_eager():
    kind, options = "replay", "greedy"
    state, draft_params = begin(kind, options)
    eager = decoding.speculative(MODEL, DRAFTERS[kind][0], ExactMatch()).step(PARAMS, draft_params, state)
    jitted = run(kind, options, blocks=(1,))
    for mine, other in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(mine, other, atol=TOLERANCE)


def test_logits_at_tree_nodes_are_those_of_the_path_alone():
    """Random topologies, another in every row and round; and `update` gets the outcome."""
    state, draft_params = begin("random trees", "every option")
    branched = 0
    for _ in range(3):
        before = texts(state)
        state = compiled("random trees")[1](PARAMS, draft_params, state, 1)
        seen = jax.tree.map(np.asarray, state.draft)
        after = texts(state)
        for row in range(3):
            paths = []
            for node in range(RandomTrees.num_nodes):
                parent = seen.parent[row, node]
                paths.append([*paths[parent], node] if node else [0])
            branched += len(set(seen.parent[row])) < RandomTrees.num_nodes
            nodes = [np.concatenate([before[row][:-1], seen.token[row][path]]) for path in paths]
            out, logits = forward(PARAMS, padded(nodes))
            for node, text in enumerate(nodes):
                at = len(text) - 1
                np.testing.assert_allclose(seen.logits[row, node], logits[node, at], atol=TOLERANCE)
                for index in (0, 1, 2):
                    want = out.captured[index][node, at]
                    np.testing.assert_allclose(seen.captured[index][row, node], want, atol=TOLERANCE)
            emitted = seen.num_emitted[row]
            assert emitted == len(after[row]) - len(before[row]) > 0
            path = seen.path[row, :emitted]
            np.testing.assert_array_equal(path, paths[path[-1]])
            assert seen.is_candidate[row, path[1:]].all()
            np.testing.assert_array_equal(seen.token[row, path], after[row][len(before[row]) - 1 : -1])
    assert branched >= 6


def nonfinite_at(token):
    return {**PARAMS, "embedding": PARAMS["embedding"].at[token].set(jnp.nan)}


@pytest.mark.parametrize("end", ["fails", "stops", "limit"])
def test_a_row_that_becomes_nonfinite_inside_a_draft_fails_alone(end):
    """One token's embedding is NaN. The row that drafts and emits it keeps what plain decoding keeps: that token too.

    Where the row ends with that very token it has not failed, whatever followed in its draft.
    """
    row = 1
    place, bad = inside_a_block(row)
    params, new = nonfinite_at(bad), NEW.copy()
    new[row] = place + 1 if end == "limit" else NEW[row]
    stops = (bad, -1) if end == "stops" else (-1, -1)
    want = plain_decode(params, start(params=params, new=new, stop_token_ids=stops))
    np.testing.assert_array_equal(want.failed, [False, end == "fails", False])
    recording = Recording.create(recorded_tokens(), wrong_rate=0)
    got = run("replay", draft_params=recording, params=params, new=new, stop_token_ids=stops)
    assert len(texts(got)[row]) == LENGTHS[row] + place + 1
    assert_same(got, want)


def test_a_nonfinite_token_that_is_only_drafted_changes_no_row():
    bad = next(token for token in range(VOCABULARY) if not any(token in text for text in texts(plain())))
    params = nonfinite_at(bad)
    recording = Recording(jnp.full((3, CAPACITY), bad), jnp.zeros((3, CAPACITY), bool))
    assert_same(run("replay", draft_params=recording, params=params), plain_decode(params, start(params=params)))


def test_one_compile_per_bucket():
    """The start included; other values of the sampling options and other recordings do not compile again either."""
    traces = []
    drafter = Replay(2, VOCABULARY)

    def counted(params, draft_params, state):
        traces.append(state.tokens.shape)
        return decoding.speculative(MODEL, drafter, ExactMatch())(params, draft_params, state)

    decode = jax.jit(counted, donate_argnums=2)
    for length, new, temperature in ((9, 12, 0.5), (12, 12, 1.0), (10, 11, 0.7), (11, 13, 0.9)):
        tokens = np.random.default_rng(length).integers(0, VOCABULARY, (2, length))
        sampling = decoding.Sampling.create(2, VOCABULARY, temperature=[temperature, 0.3])
        state = decoding.prefill(
            MODEL, PARAMS, tokens, np.full(2, length), new, np.zeros(2, int), sampling=sampling, stop_token_ids=(3,)
        )
        recording = Recording.create(np.zeros((2, 24), int), wrong_rate=0.5, seed=length)
        decode(PARAMS, recording, state)
    assert traces == [(2, 24)]


@pytest.mark.parametrize(
    ("drafter", "draft_params"),
    [
        (PromptLookup(CAPACITY + 5, max_ngram=2), None),
        (DraftModel(SHALLOW, (-1, *[0] * 35, *range(1, CAPACITY - 30)), Children.CHOSEN), PARAMS),
    ],
    ids=["chain", "tree"],
)
@pytest.mark.quick_cases(1)
def test_a_draft_may_be_larger_than_the_buffers(drafter, draft_params):
    """Like the default draft of a strategy, where few tokens are requested."""
    assert drafter.num_nodes > CAPACITY
    state = jax.jit(decoding.speculative(MODEL, drafter, ExactMatch()))(PARAMS, draft_params, start())
    assert_same(state, plain())
    assert int(state.counts.accepted.sum()) > 0


def test_a_drafter_must_propose():
    with pytest.raises(NotImplementedError, match="Silent must say what it proposes"):

        @dataclasses.dataclass(frozen=True)
        class Silent(Drafter):
            num_nodes: int = 2
            max_depth: int = 1

        decoding.speculative(MODEL, Silent(), ExactMatch())(PARAMS, None, start())
