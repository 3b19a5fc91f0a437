"""Appending a block of tokens to every row gives what a loop in plain Python gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.decoding.logits_processors import History
from decodax.decoding.sampling import Sampling
from decodax.decoding.state import DecodeState, LayerCounts

ROWS, CAPACITY, BLOCK, VOCABULARY = 199, 13, 5, 11
STOPS = (3, 7)


def example(with_counts=True):
    """Rows of all lengths, many near their limit, some done; blocks in which stop tokens are frequent."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCABULARY, (ROWS, CAPACITY))
    limit = random.integers(2, CAPACITY + 1, ROWS)
    done = random.random(ROWS) < 0.2
    length = np.where(done, random.integers(1, limit + 1), random.integers(1, limit))
    history = History.start(jnp.asarray(tokens), jnp.asarray(length), vocab_size=VOCABULARY, with_counts=with_counts)
    state = DecodeState(
        layer_counts=LayerCounts.zero(ROWS),
        tokens=jnp.asarray(tokens, jnp.int32), logprobs=jnp.zeros((ROWS, CAPACITY)),
        length=jnp.asarray(length, jnp.int32), limit=jnp.asarray(limit, jnp.int32), done=jnp.asarray(done),
        failed=jnp.zeros(ROWS, bool), seed=jnp.zeros(ROWS, jnp.uint32), stop_token_ids=jnp.asarray([STOPS] * ROWS),
        caches=(), history=history, sampling=Sampling.create(ROWS, VOCABULARY), num_target_forwards=jnp.int32(0),
    )  # fmt: skip
    block, logprob = random.integers(0, VOCABULARY, (ROWS, BLOCK)), random.standard_normal((ROWS, BLOCK))
    count = np.minimum(random.integers(0, 2 * BLOCK, ROWS), BLOCK)
    return state, block.astype(np.int32), logprob.astype(np.float32), count.astype(np.int32)


def appended(state, block, logprob, count):
    """Arrays of the state after the rows took their tokens one by one."""
    tokens, logprobs, length, done = (np.array(x) for x in (state.tokens, state.logprobs, state.length, state.done))
    taken, counts = np.zeros(ROWS, int), np.zeros((ROWS, VOCABULARY), int)
    for row in range(ROWS):
        for token, value in list(zip(block[row], logprob[row], strict=True))[: count[row]]:
            if done[row]:
                break
            tokens[row, length[row]], logprobs[row, length[row]] = token, value
            length[row] += 1
            taken[row] += 1
            counts[row, token] += 1
            done[row] = token in STOPS or length[row] == state.limit[row]
    return tokens, logprobs, length, done, taken, counts


@pytest.mark.parametrize("append", [DecodeState.append, jax.jit(DecodeState.append)], ids=["eager", "jitted"])
def test_append(append):
    state, block, logprob, count = example()
    tokens, logprobs, length, done, taken, counts = appended(state, block, logprob, count)
    assert len({(n, bool(d)) for n, d in zip(taken, done, strict=True)}) == 2 * BLOCK + 2  # 0 to all, with end or not
    after, got_taken = append(state, jnp.asarray(block), jnp.asarray(logprob), jnp.asarray(count))
    np.testing.assert_array_equal(got_taken, taken)
    for name, want in (("tokens", tokens), ("logprobs", logprobs), ("length", length), ("done", done)):
        np.testing.assert_array_equal(getattr(after, name), want, err_msg=name)
    np.testing.assert_array_equal(after.history.output_counts, counts)
    np.testing.assert_array_equal(after.history.num_new_tokens, taken)
    np.testing.assert_array_equal(after.history.prompt_counts, state.history.prompt_counts)
    last = tokens[np.arange(ROWS), length - 1]
    np.testing.assert_array_equal(after.last_token(), last)


def test_append_without_counts():
    state, block, logprob, count = example(with_counts=False)
    after, taken = state.append(jnp.asarray(block), jnp.asarray(logprob), jnp.asarray(count))
    assert after.history.output_counts is None
    np.testing.assert_array_equal(after.history.num_new_tokens, taken)
