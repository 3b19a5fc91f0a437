"""Every cache does what the contract says: a layer reads what was committed, row by row, and nothing else."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.kv_cache import METHODS as OURS
from decodax.layers.kv_cache.contract import Cache
from decodax.layers.kv_cache.micro_batch import MicroBatch, micro_batch_cache
from decodax.layers.kv_cache.stacked import Stacked
from tests.contracts.examples import kv_cache
from tests.contracts.examples.kv_cache import BATCH
from tests.contracts.lookup import examples_of
from tests.contracts.outside import with_outside
from tests.contracts.updates import concatenated, token_axes, tokens_of_row, update_of_rows

EXAMPLES = examples_of(kv_cache, with_outside(OURS, "kv_cache"))
CAPACITY, TOKENS = 12, 5
COUNT, MORE = np.array([3, 0, 2], np.int32), np.array([1, 4, 0], np.int32)
PATH = np.array([[4, 0, 2, 1], [1, 1, 0, 2], [3, 1, 4, 4]], np.int32)
# Sums of a dozen float32 numbers below 1, in any order; what is only copied is the same to the last bit.
TOLERANCE = 1e-6


def having(attribute):
    """The examples whose method has this attribute."""
    names = [name for name in EXAMPLES if hasattr(EXAMPLES.method_of(name), attribute)]
    assert names, f"no cache has {attribute}"
    return names


commit = jax.jit(lambda cache, update, count, path=None: cache.commit(update, count, path))
place = jax.jit(lambda buffer, update, slot: buffer.place(update, slot))
rewound = jax.jit(lambda cache, length: cache.rewound(length))
read_shard = jax.jit(lambda cache, first: cache.shard(first).read(jnp.int32(0), CAPACITY // 2))


@jax.jit
def commit_marked(cache, update, kept, count, path=None):
    return cache.commit(dataclasses.replace(update, kept=kept), count, path)


@jax.jit
def place_marked(buffer, update, kept, slot):
    return buffer.place(dataclasses.replace(update, kept=kept), slot)


@partial(jax.jit, static_argnums=(0, 4))
def seen_by_micro_batch(example, stack, layer, row, in_place):
    """What a layer of a stack sees of one row's cache."""
    rows = MicroBatch(row, count=BATCH, groups=1)
    return seen(example, micro_batch_cache(stack, layer, rows, in_place=in_place), jnp.int32(2), 7)


@partial(jax.jit, static_argnums=(0, 3))
def seen(example, cache, start, num_slots):
    """What a layer sees of a cache: its length, its state, and what it reads of slots."""
    slots = () if example.slots is None else example.slots(cache).read(start, num_slots)
    return cache.length, example.held(cache), slots


def read_by_heads(slots):
    """The keys and the values [tokens, H] that each head of each row reads."""
    key, value, _, valid = map(np.asarray, slots)
    valid = np.broadcast_to(valid, key.shape[:3])
    return {head: (key[head][valid[head]], value[head][valid[head]]) for head in np.ndindex(key.shape[:2])}


def assert_same(example, got, want, *, alike=False):
    """Two caches look the same to a layer; `alike`: they may have other lengths, and tokens at other positions."""
    (length, held, slots), (wanted_length, wanted_held, wanted_slots) = (
        seen(example, cache, np.int32(0), CAPACITY) for cache in (got, want)
    )
    for one, other in zip(held, wanted_held, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)
    if slots:
        np.testing.assert_equal(read_by_heads(slots), read_by_heads(wanted_slots))
    if not alike:
        np.testing.assert_array_equal(length, wanted_length)
        np.testing.assert_equal(list(map(np.asarray, slots[2:])), list(map(np.asarray, wanted_slots[2:])))


def assert_identical(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(one, other)


def with_nan(tree, rows=slice(None)):
    """The tree with NaN in these rows of its arrays."""

    def change(leaf):
        leaf = np.array(leaf)
        if leaf.dtype.kind == "f":
            leaf[rows] = np.nan
        return leaf

    return jax.tree.map(change, tree)


class Filled:
    """An example: a cache whose rows hold 3, 0 and 2 tokens, a longer one, and updates."""

    def __init__(self, example):
        self.example, self.axes = example, token_axes(example.empty_update)
        self.cache = commit(self.empty(CAPACITY), self.update(0), COUNT)
        self.longer = commit(self.cache, self.update(6), np.full(BATCH, TOKENS, np.int32))

    def empty(self, capacity):
        """In NumPy, so that nothing is compiled for it."""
        shapes = jax.eval_shape(lambda: self.example.empty(capacity))
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    def update(self, seed, num_tokens=TOKENS):
        """Random numbers between -1 and 0, as log decays are."""
        random = np.random.default_rng(seed)
        shapes = jax.eval_shape(lambda: self.example.empty_update(num_tokens))
        return jax.tree.map(lambda leaf: random.uniform(-1, 0, leaf.shape).astype(leaf.dtype), shapes)

    def tokens(self, update, row, indices):
        return tokens_of_row(update, self.axes, row, indices)


@pytest.fixture(scope="module", params=EXAMPLES)
def filled(request):
    return Filled(EXAMPLES[request.param])


def test_an_example_is_of_its_method(request, filled):
    empty = filled.example.empty(CAPACITY)
    assert type(empty) is EXAMPLES.method_of(request.node.callspec.params["filled"])
    assert empty.capacity == CAPACITY and empty.length.shape == (BATCH,)
    assert filled.example.slots is None or isinstance(filled.example.slots(empty), Cache)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((empty, filled.example.empty_update(TOKENS))))


def test_a_layer_sees_what_was_committed(filled):
    """By definition; the last row is full after the third commit."""
    cache, rows = filled.empty(CAPACITY), [filled.tokens(filled.update(0), row, []) for row in range(BATCH)]
    for seed, (count, path) in enumerate([([3, 0, 5], None), ([2, 4, 4], PATH), ([0, 5, 3], None), ([4, 1, 0], PATH)]):
        update = filled.update(seed)
        cache = commit(cache, update, np.array(count, np.int32), path)
        for row, size in enumerate(count):
            indices = range(size) if path is None else path[row, :size]
            rows[row] = concatenated([rows[row], filled.tokens(update, row, indices)])
        for start, num_slots in ((0, CAPACITY), (2, 7)):
            length, held, slots = seen(filled.example, cache, np.int32(start), num_slots)
            for row, tokens in enumerate(rows):
                assert length[row] == len(jax.tree.leaves(tokens)[0])
                for got, want in zip(held, filled.example.held_after(tokens), strict=True):
                    np.testing.assert_allclose(got[row], want, rtol=0, atol=TOLERANCE)
                if slots:
                    check_slots(filled.example, slots, row, tokens, start + np.arange(num_slots))


def check_slots(example, slots, row, tokens, position):
    """What is read of a row: slot by slot the tokens at these positions, and no others are valid."""
    key, value, read_position, valid = map(np.asarray, slots)
    wanted_keys, wanted_values = (np.moveaxis(wanted, 0, 1) for wanted in example.read_as(tokens))  # [K, tokens, H]
    is_filled = position < wanted_keys.shape[1]
    np.testing.assert_array_equal(read_position[row % len(read_position)], position)
    np.testing.assert_array_equal(np.broadcast_to(valid, key.shape[:3])[row], [is_filled] * key.shape[1])
    np.testing.assert_array_equal(key[row][:, is_filled], wanted_keys[:, position[is_filled]])
    np.testing.assert_array_equal(value[row][:, is_filled], wanted_values[:, position[is_filled]])


def test_an_empty_cache_like_a_filled_one(filled):
    for cache, capacity in ((filled.cache, CAPACITY), (filled.longer, CAPACITY), (filled.empty(3), 3)):
        assert_identical(cache.empty_like(), filled.example.empty(capacity))


def test_a_commit_of_no_token_changes_nothing(filled):
    """To the last bit, whatever the update holds."""
    nothing, update = np.zeros(BATCH, np.int32), with_nan(filled.update(1))
    for path in (None, PATH):
        assert_identical(commit(filled.cache, update, nothing, path), filled.cache)


def test_a_committed_path_is_its_tokens_in_that_order(filled):
    update = filled.update(1)
    rows = [filled.tokens(update, row, [*path, 0]) for row, path in enumerate(PATH)]
    want = commit(filled.cache, update_of_rows(rows, filled.axes), COUNT)
    assert_same(filled.example, commit(filled.cache, update, COUNT, PATH), want)


def test_two_commits_are_one_of_all_their_tokens(filled):
    one, other = filled.update(1), filled.update(2)
    want = commit(commit(filled.cache, one, COUNT), other, MORE)
    rows = []
    for row, (count, more) in enumerate(zip(COUNT, MORE, strict=True)):
        both = [filled.tokens(one, row, range(count)), filled.tokens(other, row, range(more))]
        rest = filled.tokens(other, row, [0] * (TOKENS - count - more))
        rows.append(concatenated([*both, rest]))
    assert_same(filled.example, commit(filled.cache, update_of_rows(rows, filled.axes), COUNT + MORE), want)


def test_rows_do_not_touch_each_other(filled):
    """A row is the same to the last bit, whatever the others hold and commit."""
    update = filled.update(1)
    for path in (None, PATH):
        want = commit(filled.cache, update, COUNT, path)
        for row in range(BATCH):
            others = np.arange(BATCH) != row
            count = np.where(others, 1, COUNT).astype(np.int32)
            got = commit(with_nan(filled.cache, others), with_nan(update, others), count, path)
            assert_identical(*(jax.tree.map(lambda leaf, row=row: leaf[row], cache) for cache in (got, want)))


def test_eager_is_jitted(filled):
    update = jax.tree.map(jnp.asarray, filled.update(1))
    got = filled.cache.commit(update, jnp.asarray(COUNT), jnp.asarray(PATH))
    assert_same(filled.example, got, commit(filled.cache, update, COUNT, PATH))


@pytest.mark.parametrize("filled", having("rewound"), indirect=True)
def test_what_was_rewound_is_as_if_never_written(filled):
    """Also where a row has fewer tokens: that is unchanged."""
    long, length = commit(filled.cache, filled.update(1), MORE), np.array([3, 9, 0], np.int32)
    short = commit(filled.empty(CAPACITY), filled.update(0), np.array([3, 0, 0], np.int32))
    short = commit(short, filled.update(1), np.array([0, 4, 0], np.int32))
    got = rewound(long, length)
    assert_same(filled.example, got, short)
    assert_same(filled.example, *(commit(cache, filled.update(2), COUNT, PATH) for cache in (got, short)))


@pytest.mark.parametrize("filled", having("marks_tokens"), indirect=True)
def test_a_token_not_kept_counts_and_is_not_seen(filled):
    """What is seen is what the kept tokens alone would give, as a path; a cache without marks refuses any."""
    kept = np.array([[1, 0, 1, 0, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]], bool)
    count, update = np.array([4, 3, 2], np.int32), filled.update(1)
    rows = [filled.tokens(update, row, range(TOKENS)) for row in range(BATCH)]
    for tokens, is_kept in zip(rows, kept, strict=True):
        for leaf in jax.tree.leaves(tokens):
            leaf[~is_kept] = np.nan
    with_garbage = update_of_rows(rows, filled.axes)
    if not filled.cache.marks_tokens:
        with pytest.raises(ValueError, match="an update with `kept` needs a cache"):
            commit_marked(filled.cache, with_garbage, kept, count)
        return
    for path in (None, PATH):
        got = commit_marked(filled.cache, with_garbage, kept, count, path)
        np.testing.assert_array_equal(got.length, COUNT + count)
        accepted = [np.arange(size) if path is None else path[row, :size] for row, size in enumerate(count)]
        present = [nodes[kept[row, nodes]] for row, nodes in enumerate(accepted)]
        short = np.array([[*nodes, *[0] * (4 - len(nodes))] for nodes in present], np.int32)
        want = commit(filled.cache, update, np.array(list(map(len, present)), np.int32), short)
        assert_same(filled.example, got, want, alike=True)


@pytest.mark.parametrize("filled", [name for name in EXAMPLES if EXAMPLES[name].slots is not None], indirect=True)
def test_a_row_without_room_fails_and_no_other(filled):
    """No token is dropped in silence: what reads the row gets NaN, at once and ever after; other rows are untouched."""
    full = commit(filled.empty(CAPACITY), filled.update(7, CAPACITY), np.array([CAPACITY, 9, 2], np.int32))
    update, count = filled.update(8, 3), np.array([0, 3, 3], np.int32)
    fits = seen(filled.example, commit(full, update, count), np.int32(0), CAPACITY)[2]
    for path in (None, np.array([[2, 0, 1]] * BATCH, np.int32)):
        for place in (0, 1):
            over = np.where(np.arange(BATCH) == place, count + 1, count)
            wide = filled.update(8, 4)
            cache = commit(full, wide, over, None if path is None else np.pad(path, ((0, 0), (0, 1))))
            for later in (cache, commit(cache, update, np.zeros(BATCH, np.int32))):
                key, _, _, valid = map(np.asarray, seen(filled.example, later, np.int32(0), CAPACITY)[2])
                valid = np.broadcast_to(valid, key.shape[:3])
                for row in range(BATCH):
                    assert np.isnan(key[row][valid[row]]).any() == (row == place)
    assert np.isfinite(np.asarray(fits[0])).all()


@pytest.mark.parametrize("filled", having("shard"), indirect=True)
def test_a_shard_is_a_cache_of_its_own_slots(filled):
    """Each of two devices has half of the slots; the tokens of both, one after the other, are all that are read."""
    cache, half, shards = filled.longer, CAPACITY // 2, []
    for first in (0, half):
        # Of arrays with an axis of slots, that half.
        def part(leaf, like, first=first):
            starts = [first if size < of else 0 for size, of in zip(like.shape, leaf.shape, strict=True)]
            return np.asarray(leaf)[tuple(slice(at, at + size) for at, size in zip(starts, like.shape, strict=True))]

        shards.append(read_by_heads(read_shard(jax.tree.map(part, cache, filled.empty(half)), np.int32(first))))
    for head, read in read_by_heads(seen(filled.example, cache, np.int32(0), CAPACITY)[2]).items():
        for got, want in zip(zip(*(shard[head] for shard in shards), strict=True), read, strict=True):
            np.testing.assert_array_equal(np.concatenate(got), want)


def test_staged_tokens_are_placed_in_slots(filled):
    """In the buffer's dtype; a slot beyond the last is dropped, and tokens not kept are refused."""
    buffer, slot = with_nan(filled.update(1, 4)), np.array([3, 9, 0, 4, 2], np.int32)
    update = filled.update(2)
    got = place(buffer, update, slot)
    for row in range(BATCH):
        assert_identical(filled.tokens(got, row, [3, 0, 2]), filled.tokens(update, row, [0, 2, 4]))
        assert_identical(filled.tokens(got, row, [1]), filled.tokens(buffer, row, [1]))
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), buffer)
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(place, half, update, slot))} == {
        jnp.dtype("bfloat16")
    }
    if hasattr(update, "kept"):
        with pytest.raises(ValueError, match="cannot be staged"):
            place_marked(buffer, update, np.ones((BATCH, TOKENS), bool), slot)


def stacked(*trees):
    return Stacked(jax.tree.map(lambda *leaves: np.stack(leaves), *trees))


def test_a_stack_of_layers_is_each_of_them(filled):
    """The caches of a pipeline stage commit, and the tokens staged beside them are placed, as one by one."""
    caches = filled.cache, commit(filled.empty(CAPACITY), filled.update(3), COUNT)
    updates, slot = (filled.update(4), filled.update(5)), np.array([3, 9, 0, 1, 2], np.int32)
    stack = stacked(*caches)
    assert stack.capacity == CAPACITY and stack.marks_tokens == getattr(filled.cache, "marks_tokens", False)
    for path in (None, PATH):
        got = commit(stack, stacked(*updates), COUNT, path)
        for layer, (cache, update) in enumerate(zip(caches, updates, strict=True)):
            own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], got.each)
            assert_same(filled.example, own, commit(cache, update, COUNT, path))
    np.testing.assert_array_equal(got.length, 2 * COUNT)
    wanted = stacked(*(place(buffer, update, slot) for buffer, update in zip(updates[::-1], updates, strict=True)))
    assert_identical(place(stacked(*updates[::-1]), stacked(*updates), slot), wanted)


def test_a_stack_empties_each_layer(filled):
    stack = Stacked(jax.tree.map(lambda *leaves: np.stack(leaves), filled.cache, filled.longer))
    assert_identical(stack.empty_like().each, jax.tree.map(np.zeros_like, stack.each))


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "cut out"])
def test_a_micro_batch_sees_its_rows_of_its_layer(filled, in_place):
    stack = stacked(filled.cache, filled.longer).each
    got = seen_by_micro_batch(filled.example, stack, np.int32(1), np.int32(2), in_place)
    want = seen(filled.example, filled.longer, np.int32(2), 7)
    assert_identical(got, jax.tree.map(lambda leaf: leaf[2:] if len(leaf) == BATCH else leaf, want))
