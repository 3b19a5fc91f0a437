"""The replay drafter: recorded tokens, wrong where marked, and none after the end of the recording.

That its counts come out exactly is tested with the engine, in ../test_speculative.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.decoding.drafters import Recording, Replay
from tests.speculation import CAPACITY, LENGTHS, MODEL, PARAMS, VOCABULARY, start

WIDTH = 17


def example():
    random = np.random.default_rng(3)
    tokens = random.integers(0, VOCABULARY, (3, WIDTH))
    is_wrong = random.random((3, WIDTH)) < 0.5
    tokens[:, 13], is_wrong[:, 13] = VOCABULARY - 1, True  # the last token's wrong one is the first
    recording = Recording(jnp.asarray(tokens), jnp.asarray(is_wrong))
    return dataclasses.replace(start(), length=jnp.asarray(LENGTHS), draft=recording), tokens, recording


@pytest.mark.parametrize("num_tokens", [0, 1, 6])
def test_drafts_the_recording(num_tokens):
    drafter = Replay(num_tokens, VOCABULARY)
    state, tokens, recording = example()
    is_wrong = np.asarray(recording.is_wrong)
    for propose in (drafter.propose, jax.jit(drafter.propose)):
        proposal, _ = propose(PARAMS, recording, state)
        assert proposal.tree.num_nodes == drafter.num_nodes == num_tokens + 1 == drafter.max_depth + 1
        assert proposal.tree.is_chain and proposal.logprobs is None and int(proposal.num_draft_forwards) == 0
        np.testing.assert_array_equal(proposal.token[:, 0], state.last_token())
        for row, length in enumerate(LENGTHS):
            assert not proposal.is_candidate[row, 0]
            for node in range(1, num_tokens + 1):
                place = length - 1 + node
                assert proposal.is_candidate[row, node] == (place < WIDTH)
                if place < WIDTH:
                    want = (tokens[row, place] + is_wrong[row, place]) % VOCABULARY
                    assert proposal.token[row, node] == want


def test_the_rate_of_wrong_tokens():
    recording = Recording.create(np.zeros((40, 500), int), wrong_rate=0.2, seed=1)
    # 20,000 draws: the share has a standard deviation of 0.003.
    assert abs(float(recording.is_wrong.mean()) - 0.2) < 0.015
    other = Recording.create(np.zeros((40, 500), int), wrong_rate=0.2, seed=2)
    assert (recording.is_wrong != other.is_wrong).any()
    for rate in (0.0, 1.0):
        assert float(Recording.create(np.zeros((2, 9), int), wrong_rate=rate).is_wrong.mean()) == rate


def test_bad_input():
    with pytest.raises(ValueError, match="num_tokens must be 0 or more, got -1"):
        Replay(-1, VOCABULARY)
    with pytest.raises(ValueError, match=r"wrong_rate must be in 0\.\.1 \(share of tokens\), got 1.5"):
        Recording.create(np.zeros((2, 9), int), wrong_rate=1.5)
    _, _, recording = example()
    with pytest.raises(ValueError, match="vocab_size must be the target's, 37 tokens, got 36"):
        Replay(2, 36).check(MODEL, recording)
    with pytest.raises(ValueError, match="drafts from a Recording, got dict"):
        Replay(2, VOCABULARY).check(MODEL, {})
    with pytest.raises(ValueError, match="must have the batch's 3 rows, got 2"):
        Replay(2, VOCABULARY).start(PARAMS, Recording.create(np.zeros((2, CAPACITY), int), wrong_rate=0.0), start())
