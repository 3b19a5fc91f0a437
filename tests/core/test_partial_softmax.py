"""The online softmax gives the softmax over all keys, whatever the blocks, and merged partial softmaxes do too."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.core.blockwise_attention import KeyBlock, Slots, attend_to_block, attend_to_slots, finish_by_query
from decodax.core.partial_softmax import OnlineSoftmax, PartialSoftmax, merge, merge_stack

BATCH, KV_HEADS, QUERIES, KEYS, SIZE = 2, 3, 5, 13, 7
# float32 sums of 13 weighted values of size about 1, in up to 5 blocks.
TOLERANCE = 2e-6
BLOCKS = {"one block": (0, 13), "several": (0, 2, 3, 8, 13), "one by one": tuple(range(14))}


def example():
    random = np.random.default_rng(0)
    score = random.standard_normal((BATCH, KV_HEADS, QUERIES, KEYS)).astype(np.float32) * 3
    value = random.standard_normal((BATCH, KV_HEADS, KEYS, SIZE)).astype(np.float32)
    allowed = random.random(score.shape) < 0.6
    allowed[:, :, 1, :8] = False  # its first blocks are masked
    allowed[:, :, 2] = False  # attends to nothing
    return score, value, allowed


def expected(score, value, allowed, sinks=None):
    score = np.where(allowed, score.astype(np.float64), -np.inf)
    total = np.exp(score).sum(-1) + (0 if sinks is None else np.exp(sinks))
    output = np.exp(score) @ value.astype(np.float64) / np.where(total == 0, 1, total)[..., None]
    with np.errstate(divide="ignore"):
        return output, np.log(total)


def softmax(score, value, allowed, bounds, **options):
    sinks = options.pop("sinks", None)
    seen = OnlineSoftmax.start(score.shape[:3], SIZE, sinks)
    for start, end in itertools.pairwise(bounds):
        part = (score[..., start:end], allowed[..., start:end], value[:, :, start:end])
        seen = seen.absorb(*map(jnp.asarray, part), **options)
    return seen.finish(jnp.float32)


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("bounds", BLOCKS.values(), ids=BLOCKS)
def test_equals_the_softmax_over_all_keys(bounds, reproducible):
    arrays = example()
    for got, want in zip(softmax(*arrays, bounds, reproducible=reproducible), expected(*arrays), strict=True):
        np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=TOLERANCE)


def test_sinks_take_a_share():
    arrays = example()
    sinks = np.array([0.5, -2.0, 1.0], np.float32).reshape(1, KV_HEADS, 1)
    got = softmax(*arrays, BLOCKS["several"], sinks=jnp.asarray(sinks))
    for one, want in zip(got, expected(*arrays, sinks.astype(np.float64)), strict=True):
        np.testing.assert_allclose(one, want, atol=TOLERANCE, rtol=TOLERANCE)


def test_masked_blocks_change_no_bit_where_that_is_asked_for():
    score, value, _ = example()
    everything, nothing = np.ones_like(score, bool), np.zeros_like(score, bool)
    wide = [np.concatenate(pair, axis) for pair, axis in (((score, score), 3), ((value, value), 2))]
    alone = softmax(score, value, everything, (0, 13), reproducible=True)
    for mask, bounds in (((nothing, everything), (0, 6, 13, 26)), ((everything, nothing), (0, 13, 20, 26))):
        got = softmax(*wide, np.concatenate(mask, 3), bounds, reproducible=True)
        for one, want in zip(got, alone, strict=True):
            np.testing.assert_array_equal(one, want)


def test_a_nan_key_reaches_only_the_queries_that_attend_to_it():
    score, value, allowed = example()
    score[..., 4] = np.nan
    output, lse = softmax(score, value, allowed, BLOCKS["several"])
    np.testing.assert_array_equal(np.isnan(output).all(-1), allowed[..., 4])
    np.testing.assert_array_equal(np.isnan(lse), allowed[..., 4])


def partials(arrays, bounds):
    """Partial softmaxes of the blocks, [B, T, N, ...] with T the key-value heads and N the queries."""
    score, value, allowed = arrays
    for start, end in itertools.pairwise(bounds):
        yield PartialSoftmax(*softmax(score, value, allowed, (start, end)))


@pytest.mark.parametrize("bounds", BLOCKS.values(), ids=BLOCKS)
def test_merged_partial_softmaxes_are_one(bounds):
    arrays = example()
    found = list(partials(arrays, bounds))
    one = found[0]
    for other in found[1:]:
        one = merge(one, other)
    stacked = merge_stack(*(jnp.stack(leaves, axis=1) for leaves in zip(*found, strict=True)))
    for got in (one, stacked):
        for leaf, want in zip(got, expected(*arrays), strict=True):
            np.testing.assert_allclose(leaf, want, atol=TOLERANCE, rtol=TOLERANCE)


def test_nan_survives_a_merge_with_nothing():
    output = jnp.ones((1, 1, 1, 2))
    nothing, nonfinite = PartialSoftmax(output * 0, jnp.full((1, 1, 1), -jnp.inf)), jnp.full((1, 1, 1), jnp.nan)
    for pair in ((PartialSoftmax(output, nonfinite), nothing), (nothing, PartialSoftmax(output, nonfinite))):
        assert np.isnan(merge(*pair).output).all() and np.isnan(merge(*pair).lse).all()
    assert not np.isnan(merge(nothing, nothing).output).any()


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("block_tokens", [None, 4, 13])
@pytest.mark.parametrize("end", [3, 13])
def test_slots_are_read_in_blocks_that_need_not_fit(block_tokens, end, on_cpu, monkeypatch):
    """The last block overlaps the one before it, and no slot counts twice."""
    monkeypatch.setattr("decodax.core.blockwise_attention.BLOCK_TOKENS", 5)
    random = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    query, key, value = draw(BATCH, KV_HEADS, 4, SIZE), *(draw(BATCH, KV_HEADS, KEYS, SIZE) for _ in "kv")
    allowed = jnp.broadcast_to(jnp.arange(KEYS) < end, (1, 1, 2, KEYS))  # two tokens, two heads of each key-value head

    def read(start, num_tokens):
        key_, value_ = (jax.lax.dynamic_slice_in_dim(x, start, num_tokens, axis=2) for x in (key, value))
        return KeyBlock(key_, value_, jax.lax.dynamic_slice_in_dim(allowed, start, num_tokens, axis=3))

    nothing = OnlineSoftmax.start(query.shape[:3], SIZE)
    options = {"scale": 0.5, "softcap": 2.0}
    run = jax.jit(
        lambda end: attend_to_slots(
            nothing, query, Slots(read, KEYS), jnp.int32(0), end, **options, block_tokens=block_tokens, on_cpu=on_cpu
        )
    )
    whole = attend_to_block(nothing, query, KeyBlock(key, value, allowed), **options)
    got, want = (finish_by_query(seen, 2, jnp.float32) for seen in (run(end), whole))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE, rtol=TOLERANCE)
    score = np.einsum("bkqh,bksh->bkqs", *(np.asarray(x, np.float64) for x in (query, key))) * 0.5
    output, lse = expected(
        2 * np.tanh(score / 2), np.asarray(value), np.broadcast_to(np.arange(KEYS) < end, score.shape)
    )
    by_query = lambda grouped: np.moveaxis(grouped.reshape(BATCH, KV_HEADS, 2, 2, -1), 1, 2).reshape(BATCH, 2, 6, -1)
    np.testing.assert_allclose(got[0], by_query(output), atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_allclose(got[1], by_query(lse)[..., 0], atol=TOLERANCE, rtol=TOLERANCE)
