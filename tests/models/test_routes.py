"""Hidden states are the same by every route: at once, in chunks, token by token, along a tree's path, in any batch."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.attention.mask import Ancestors
from decodax.models.model import commit
from tests.tiny import tiny_model

MODEL, PARAMS = tiny_model()
BATCH, TOKENS, CAPACITY = 3, 13, 29
INPUT = np.random.default_rng(0).integers(0, 37, (BATCH, TOKENS))
POSITION = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), INPUT.shape)


@partial(jax.jit, static_argnames=("capture", "layers"))
def forward(inputs, position, caches, mask=None, layers=None, capture=()):
    out = MODEL.apply(PARAMS, inputs, position, caches, mask=mask, layers=layers, capture=capture)
    return out, MODEL.logits(PARAMS, out.hidden)


commit = jax.jit(commit)


@cache
def whole():
    return np.asarray(forward(jnp.asarray(INPUT), jnp.asarray(POSITION), None)[1])


def assert_same(got, want):
    """To 1e-5 of the largest logit."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def prefix(counts, capacity=CAPACITY):
    """Caches that hold the first counts[b] tokens of each row."""
    counts = np.asarray(counts)
    caches = MODEL.empty_cache(BATCH, capacity, jnp.float32)
    out, _ = forward(jnp.asarray(INPUT), jnp.asarray(POSITION), caches)
    return commit(caches, out.cache_updates, jnp.asarray(counts))


@pytest.mark.parametrize("pieces", [(13,), (5, 1, 7), (1,) * 13], ids=["whole", "chunks", "steps"])
def test_pieces(pieces):
    caches = MODEL.empty_cache(BATCH, CAPACITY, jnp.float32)
    logits, start = [], 0
    for size in pieces:
        piece = slice(start, start + size)
        out, new = forward(jnp.asarray(INPUT[:, piece]), jnp.asarray(POSITION[:, piece]), caches)
        caches, start = commit(caches, out.cache_updates, jnp.full(BATCH, size)), start + size
        logits.append(new)
    assert_same(np.concatenate(logits, axis=1), whole())


@pytest.mark.parametrize("capacity", [19, 61])
def test_rows_of_different_length_in_buffers_of_any_size(capacity):
    counts = np.array([0, 4, 12])
    position = counts[:, None].astype(np.int32)
    tokens = np.take_along_axis(INPUT, counts[:, None], 1)
    _, logits = forward(jnp.asarray(tokens), jnp.asarray(position), prefix(counts, capacity))
    assert_same(logits[:, 0], whole()[np.arange(BATCH), counts])


def test_row_alone():
    for row in range(BATCH):
        _, logits = forward(jnp.asarray(INPUT[row : row + 1]), jnp.asarray(POSITION[row : row + 1]), None)
        assert_same(logits[0], whole()[row])


def test_tree_nodes_equal_their_paths():
    parents = np.array([[-1, 0, 0, 2, 1, 3], [-1, 0, 1, 2, 3, 4], [-1, -1, 1, 1, 0, 3]])
    counts = np.array([2, 0, 7])
    node_tokens = np.random.default_rng(1).integers(0, 37, parents.shape)
    mask = Ancestors.from_parents(jnp.asarray(parents))
    depth = np.asarray(mask.allowed).sum(-1) - 1
    position = (counts[:, None] + depth).astype(np.int32)
    _, logits = forward(jnp.asarray(node_tokens), jnp.asarray(position), prefix(counts), mask=mask)
    alone = np.full((BATCH * parents.shape[1], TOKENS), 0)
    ends = []
    for row in range(BATCH):
        for node in range(parents.shape[1]):
            path = [a for a in range(node + 1) if np.asarray(mask.allowed)[row, node, a]]
            text = [*INPUT[row, : counts[row]], *node_tokens[row, path]]
            alone[len(ends), : len(text)] = text
            ends.append(len(text) - 1)
    positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), alone.shape)
    _, want = forward(jnp.asarray(alone), jnp.asarray(positions), None)
    want = np.asarray(want)[np.arange(len(ends)), ends].reshape(logits.shape)
    assert_same(logits, want)


def test_committed_path_equals_decoding_it():
    """After one tree path is committed, the next token attends to exactly the path, in order."""
    parents = np.array([[-1, 0, 0, 2, 1]] * BATCH)
    path = np.array([[0, 2, 3]] * BATCH)
    counts = np.array([1, 5, 9])
    nodes = np.full(parents.shape, 36)
    for step, node in enumerate(path[0]):
        nodes[np.arange(BATCH), node] = INPUT[np.arange(BATCH), counts + step]
    mask = Ancestors.from_parents(jnp.asarray(parents))
    position = (counts[:, None] + np.asarray(mask.allowed).sum(-1) - 1).astype(np.int32)
    caches = prefix(counts)
    out, _ = forward(jnp.asarray(nodes), jnp.asarray(position), caches, mask=mask)
    caches = commit(caches, out.cache_updates, jnp.asarray([3, 3, 3]), jnp.asarray(path))
    after = counts + 3
    tokens = np.take_along_axis(INPUT, after[:, None], 1)
    _, logits = forward(jnp.asarray(tokens), jnp.asarray(after[:, None].astype(np.int32)), caches)
    assert_same(logits[:, 0], whole()[np.arange(BATCH), after])


def test_ranges_of_layers_and_capture():
    position = jnp.asarray(POSITION)
    both, _ = forward(jnp.asarray(INPUT), position, None, capture=(0, 1, 2))
    lower, _ = forward(jnp.asarray(INPUT), position, None, layers=(0, 1))
    upper, logits = forward(lower.hidden, position, None, layers=(1, 2))
    assert_same(logits, whole())
    assert len(lower.cache_updates) == len(upper.cache_updates) == 1 and len(both.cache_updates) == 2
    assert_same(both.captured[0], MODEL.embed(PARAMS, jnp.asarray(INPUT), jnp.zeros(INPUT.shape, jnp.int32)))
    assert_same(both.captured[1], lower.hidden)
    assert_same(both.captured[2], upper.hidden)
    only, _ = forward(jnp.asarray(INPUT), position, None, capture=(1,))
    assert only.captured.keys() == {1}
    # The last layer of the range decides, whatever is captured: an early exit reads its own logits.
    assert_same(MODEL.logits(PARAMS, lower.hidden), forward(jnp.asarray(INPUT), position, None, layers=(0, 1))[1])


def test_own_embeddings_as_input():
    hidden = MODEL.embed(PARAMS, jnp.asarray(INPUT), jnp.zeros(INPUT.shape, jnp.int32))
    assert_same(forward(hidden, jnp.asarray(POSITION), None)[1], whole())


def test_skipped_layer_reads_as_if_the_token_were_absent():
    """A token that is marked as not kept leaves no trace in that layer."""
    model, layer = MODEL, MODEL.config.blocks[1].mixer.layer
    hidden = jax.random.normal(jax.random.key(2), (1, 4, 23))
    position = jnp.arange(4, dtype=jnp.int32)[None]
    run = partial(model.apply, PARAMS, layers=(1, 2))

    def caches(update, count):
        cache = type(layer.empty_cache(1, 7, jnp.float32)).empty(1, 3, 7, 8, jnp.float32, track_kept=True)
        return (None, cache.commit(update, jnp.asarray([count])))

    update = run(hidden[:, :3], position[:, :3]).cache_updates[0]
    skipped = caches(dataclasses.replace(update, kept=jnp.asarray([[True, False, True]])), 3)
    absent = caches(jax.tree.map(lambda leaf: leaf[:, :, jnp.asarray([0, 2])], update), 2)
    got, want = (run(hidden[:, 3:], position[:, 3:], cache).hidden for cache in (skipped, absent))
    assert_same(got, np.asarray(want))


def test_weights_are_described_as_they_are():
    from decodax.core.weight import Weight

    shapes = jax.tree.map(lambda w: w.shape, MODEL.config.weights(), is_leaf=lambda leaf: isinstance(leaf, Weight))
    assert jax.tree.map(lambda leaf: leaf.shape, PARAMS) == shapes


def test_bad_arguments():
    token, position = jnp.asarray(INPUT), jnp.asarray(POSITION)
    with pytest.raises(ValueError, match=r"layers must be a range within 0\.\.2, got \(1, 3\)"):
        MODEL.apply(PARAMS, token, position, layers=(1, 3))
    with pytest.raises(ValueError, match=r"capture must be in 0\.\.1"):
        MODEL.apply(PARAMS, token, position, layers=(0, 1), capture=(2,))
    with pytest.raises(ValueError, match="caches must have the 2 entries of `empty_cache`"):
        MODEL.apply(PARAMS, token, position, MODEL.empty_cache(3, 8, jnp.float32)[:1])
    misshapen = {**PARAMS, "head": PARAMS["head"][:5]}
    with pytest.raises(ValueError, match=r"weight head must have shape \(37, 23\)"):
        MODEL.apply(misshapen, token, position)
    incomplete = {**PARAMS, "blocks_0": {k: v for k, v in PARAMS["blocks_0"].items() if k != "mixer"}}
    with pytest.raises(ValueError, match="no weight blocks_0/mixer/query"):
        MODEL.apply(incomplete, token, position)
