"""Attention over cached and new tokens equals the definition, whatever the mask, the lengths and the block size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.core import pytree
from decodax.layers.attention.attend import attend
from decodax.layers.attention.attend_xla import QUERY_TILE_TOKENS, attend_in_xla
from decodax.layers.attention.mask import Ancestors, Causal, Mask, Window
from decodax.layers.kv_cache.full import KVCache, KVUpdate
from tests.oracles.attention import attention

BATCH, QUERIES, HEADS, KV_HEADS, SIZE, CAPACITY = 3, 5, 6, 2, 7, 19
LENGTHS = np.array([0, 11, 19])
PARENTS = np.array([[-1, 0, 0, 2, 1], [-1, 0, 1, 2, 3], [-1, 0, 0, 0, 3]])
GARBAGE = 1e4  # in slots that hold no token
# float32 sums of at most 24 weighted values of size about 1, after an exponential: a few units of 2^-24 each.
TOLERANCE = 2e-6

MASKS = {
    "causal": (Causal(), None),
    "window": (Causal() & Window(4), 4),
    "tree": (None, None),
    "tree in a window": (None, 4),
}


def ancestors_of(parents):
    allowed = np.zeros((len(parents), len(parents[0]), len(parents[0])), bool)
    for row, tree in enumerate(parents):
        for node in range(len(tree)):
            above = node
            while above >= 0:
                allowed[row, node, above] = True
                above = tree[above]
    return allowed


def example(name):
    random = np.random.default_rng(0)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)
    mask, window = MASKS[name]
    tree = name.startswith("tree")
    if tree:
        depth = ancestors_of(PARENTS).sum(-1) - 1
        mask = Ancestors.from_parents(jnp.asarray(PARENTS))
        mask = mask if window is None else mask & Window(window)
    else:
        depth = np.broadcast_to(np.arange(QUERIES), (BATCH, QUERIES))
    query, key, value = draw(BATCH, QUERIES, HEADS, SIZE), *(draw(BATCH, KV_HEADS, QUERIES, SIZE) for _ in "kv")
    cached = [draw(BATCH, KV_HEADS, CAPACITY, SIZE) for _ in "kv"]
    for row, length in enumerate(LENGTHS):
        for buffer in cached:
            buffer[row, :, length:] = GARBAGE
    kept = random.random((BATCH, KV_HEADS, CAPACITY)) < 0.7
    position = (LENGTHS[:, None] + depth).astype(np.int32)
    new_readable = ancestors_of(PARENTS) if tree else np.tril(np.ones((QUERIES, QUERIES), bool))[None].repeat(BATCH, 0)
    return query, key, value, cached, kept, position, mask, window, new_readable


def expected(query, key, value, cached, kept, position, window, new_readable, softcap):
    output = np.zeros(query.shape)
    for row, length in enumerate(LENGTHS):
        keys = np.concatenate([cached[0][row, :, :length], key[row]], 1).swapaxes(0, 1)
        values = np.concatenate([cached[1][row, :, :length], value[row]], 1).swapaxes(0, 1)
        key_position = np.concatenate([np.arange(length), position[row]])
        for token in range(QUERIES):
            readable = np.concatenate([np.ones(length, bool), new_readable[row, token]])
            if window is not None:
                readable = readable & (key_position > position[row, token] - window)
            readable = np.repeat(readable[:, None], KV_HEADS, 1)
            if kept is not None:
                readable[:length] &= kept[row, :, :length].T
            output[row, token] = attention(query[row, token], keys, values, readable, 0.3, softcap)
    return output


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("with_kept", [False, True])
@pytest.mark.parametrize("block_tokens", [4, CAPACITY])
@pytest.mark.quick_cases(10)
def test_equals_the_definition(name, with_kept, block_tokens):
    query, key, value, cached, kept, position, mask, window, new_readable = example(name)
    kept = kept if with_kept else None
    softcap = 1.5 if with_kept else None
    cache = KVCache(*map(jnp.asarray, cached), jnp.asarray(LENGTHS), None if kept is None else jnp.asarray(kept))

    def run(query, key, value, cache):
        return attend_in_xla(
            query, key, value, jnp.asarray(position), mask, cache, scale=0.3, softcap=softcap, block_tokens=block_tokens
        )[0]

    want = expected(query, key, value, cached, kept, position, window, new_readable, softcap)
    arrays = (jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), cache)
    np.testing.assert_allclose(jax.jit(run)(*arrays), want, atol=TOLERANCE, rtol=TOLERANCE)
    if name == "window":
        np.testing.assert_allclose(run(*arrays), want, atol=TOLERANCE, rtol=TOLERANCE)


def test_reads_only_blocks_with_visible_tokens():
    """NaN in a block that no query may see, before the window or after the longest row, does no harm."""
    query, key, value, cached, _, _, mask, _, _ = example("window")
    length = np.array([17, 18, 16])
    position = (length[:, None] + np.arange(QUERIES)).astype(np.int32)
    clean = [buffer.copy() for buffer in cached]
    for buffer, sound in zip(cached, clean, strict=True):
        sound[np.isin(sound, GARBAGE)] = 0.0
        buffer[:] = sound
        buffer[:, :, :12] = np.nan
    outputs = [
        attend_in_xla(
            jnp.asarray(query),
            jnp.asarray(key),
            jnp.asarray(value),
            jnp.asarray(position),
            mask,
            KVCache(*map(jnp.asarray, buffers), jnp.asarray(length)),
            scale=0.3,
            softcap=None,
            block_tokens=4,
        )[0]
        for buffers in (clean, cached)
    ]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("longest", [170, 290], ids=["in blocks", "whole"])
@pytest.mark.parametrize("window", [None, 40])
def test_large_caches_read_both_ways(longest, window):
    """Beyond one block the way of reading depends on how full the cache is; both give the definition."""
    capacity, lengths = 300, np.array([0, 3, longest])
    random = np.random.default_rng(2)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)
    query, key, value = draw(BATCH, 1, HEADS, SIZE), *(draw(BATCH, KV_HEADS, 1, SIZE) for _ in "kv")
    cached = [draw(BATCH, KV_HEADS, capacity, SIZE) for _ in "kv"]
    for row, length in enumerate(lengths):
        for buffer in cached:
            buffer[row, :, length:] = GARBAGE
    mask = Causal() if window is None else Causal() & Window(window)
    arrays = (*map(jnp.asarray, (query, key, value)), jnp.asarray(lengths[:, None], jnp.int32))
    got, lse = attend(*arrays, mask, KVCache(*map(jnp.asarray, cached), jnp.asarray(lengths)), scale=0.3, softcap=None)
    for row, length in enumerate(lengths):
        keys, values = (
            np.concatenate([old[row, :, :length], new[row]], 1).swapaxes(0, 1)
            for old, new in zip(cached, (key, value), strict=True)
        )
        readable = np.arange(length + 1) > (-1 if window is None else length - window)
        want = attention(query[row, 0], keys, values, readable, 0.3)
        np.testing.assert_allclose(got[row, 0], want, atol=TOLERANCE, rtol=TOLERANCE)
        for head in range(HEADS):
            scores = 0.3 * keys[readable, head * KV_HEADS // HEADS].astype(np.float64) @ query[row, 0, head]
            np.testing.assert_allclose(lse[row, 0, head], np.log(np.exp(scores).sum()), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_many_new_tokens_in_tiles(tree, monkeypatch):
    """Tiles of queries that read no later key give what the definition gives for all keys."""
    monkeypatch.setattr("decodax.layers.attention.attend_xla.QUERY_TILE_TOKENS", 3)
    random = np.random.default_rng(3)
    count = 11
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)
    query, key, value = draw(BATCH, count, HEADS, SIZE), *(draw(BATCH, KV_HEADS, count, SIZE) for _ in "kv")
    cached = [draw(BATCH, KV_HEADS, CAPACITY, SIZE) for _ in "kv"]
    parents = np.array([[-1, *(random.integers(0, node) if tree else node - 1 for node in range(1, count))]] * BATCH)
    allowed = ancestors_of(parents)
    mask = Ancestors.from_parents(jnp.asarray(parents)) if tree else Causal()
    position = (LENGTHS[:, None] + allowed.sum(-1) - 1).astype(np.int32)
    cache = KVCache(*map(jnp.asarray, cached), jnp.asarray(LENGTHS))
    arrays = (*map(jnp.asarray, (query, key, value, position)), mask, cache)
    got, _ = attend(*arrays, scale=0.3, softcap=None)
    for row, length in enumerate(LENGTHS):
        keys, values = (
            np.concatenate([old[row, :, :length], new[row]], 1).swapaxes(0, 1)
            for old, new in zip(cached, (key, value), strict=True)
        )
        for token in range(count):
            readable = np.concatenate([np.ones(length, bool), allowed[row, token]])
            want = attention(query[row, token], keys, values, readable, 0.3)
            np.testing.assert_allclose(got[row, token], want, atol=TOLERANCE, rtol=TOLERANCE)


@pytree.dataclass
class InBlocks(Mask):
    """A query attends to the cached tokens and to all new tokens of its own block: an image, or with one an encoder."""

    size: int = pytree.static()

    def allows(self, query, key):
        if not key.is_new:
            return jnp.ones((1, query.position.shape[1], key.position.shape[1]), bool)
        return query.position[:, :, None] // self.size == key.position[:, None, :] // self.size


@pytest.mark.parametrize("size", [50, 1000])
@pytest.mark.parametrize("cached", [0, 7])
def test_a_mask_of_ones_own_may_let_tokens_attend_to_later_ones(size, cached):
    """Beyond the number of queries that attend at once, too."""
    random, num_tokens = np.random.default_rng(3), 2 * QUERY_TILE_TOKENS + 5
    query, key, value = (random.standard_normal((1, heads, num_tokens, SIZE)).astype(np.float32) for heads in (2, 1, 1))
    position = np.arange(cached, cached + num_tokens)
    cache = KVCache.empty(1, 1, 16, SIZE, jnp.float32)
    past = random.standard_normal((2, 1, 1, cached, SIZE)).astype(np.float32)
    cache = cache.commit(KVUpdate(*map(jnp.asarray, past)), jnp.array([cached]))
    got, _ = attend(
        jnp.asarray(query.swapaxes(1, 2)), jnp.asarray(key), jnp.asarray(value), jnp.asarray(position)[None],
        InBlocks(size), cache if cached else None, scale=0.3, softcap=None,
    )  # fmt: skip
    keys = np.concatenate([past[0, 0], key[0]], axis=1).swapaxes(0, 1)
    values = np.concatenate([past[1, 0], value[0]], axis=1).swapaxes(0, 1)
    for token in range(0, num_tokens, 29):
        readable = np.r_[np.ones(cached, bool), position // size == position[token] // size][:, None]
        want = attention(query[0, :, token], keys, values, readable, 0.3, None)
        np.testing.assert_allclose(got[0, token], want, atol=TOLERANCE)


def test_without_cache_equals_an_empty_one():
    query, key, value, _, _, position, *_ = example("causal")
    position = jnp.asarray(np.broadcast_to(np.arange(QUERIES), position.shape))
    arrays = (jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), position, Causal())
    empty = KVCache.empty(BATCH, KV_HEADS, CAPACITY, SIZE, jnp.float32)
    without = attend(*arrays, None, scale=0.3, softcap=None)
    for got, want in zip(attend(*arrays, empty, scale=0.3, softcap=None), without, strict=True):
        np.testing.assert_allclose(got, want, atol=TOLERANCE)
