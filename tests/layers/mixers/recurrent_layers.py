"""Checks what every layer with a recurrent state must do, against an oracle of the layer.

An oracle maps (weights, hidden [T, D] of one row from its first token on) to the layer's outputs [T, D], in float64.
"""

import copy
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from decodax.core.weight import Weight
from decodax.layers.attention.mask import Ancestors, Causal
from decodax.layers.execution import ON_THIS_DEVICE
from decodax.layers.kv_cache.staged import Staged

WIDTH = 13
LENGTHS = np.array([5, 0, 2])  # tokens committed before a tree: beyond, at, and within the width of a convolution
PARENTS = np.array(
    [
        [-1, 0, 0, 1, 3, 2, 4, 4, 6, 8, 9],
        [-1, 0, 1, 2, 2, 0, 5, 6, 7, 7, 8],
        [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    ]
)
BATCH, NODES = PARENTS.shape
TOLERANCE = 2e-5  # float32, sums over some hundred terms of size 1


class Layer:
    """A mixer with random weights, and its oracle."""

    def __init__(self, config, oracle, seed=0):
        self.config, self.oracle = config, oracle
        self.module = config.module(WIDTH, "mixer", ON_THIS_DEVICE)
        random = np.random.default_rng(seed)

        def value(weight):
            size = 1 if len(weight.shape) == 1 else weight.shape[1] ** -0.5
            return jnp.asarray((weight.init == "ones") + size * random.standard_normal(weight.shape), jnp.float32)

        self.params = jax.tree.map(value, config.weights(WIDTH), is_leaf=lambda leaf: isinstance(leaf, Weight))
        self.weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), self.params)
        self.run = jax.jit(self.forward)

    def forward(self, hidden, position, cache, mask):
        return self.module.apply({"params": self.params}, hidden, position, position + 1, cache, mask)

    def want(self, hidden):
        return np.stack([self.oracle(self.weights, row) for row in np.asarray(hidden, np.float64)])

    def empty(self, batch=BATCH):
        return self.config.empty_cache(batch, 0, jnp.float32)


commit = jax.jit(lambda cache, *accepted: cache.commit(*accepted))


def hidden_states(num_tokens, batch=BATCH, seed=1):
    return np.random.default_rng(seed).standard_normal((batch, num_tokens, WIDTH)).astype(np.float32)


def close(got, want, tolerance=TOLERANCE):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.nanmax(np.abs(want), initial=0)))


def in_forwards(layer, hidden, sizes):
    """A chain of tokens in forwards of these sizes, each committed: all outputs, and the cache in the end."""
    cache, outputs, start = layer.empty(len(hidden)), [], 0
    for size in sizes:
        position = jnp.broadcast_to(start + jnp.arange(size, dtype=jnp.int32)[None], (len(hidden), size))
        output, update = layer.run(jnp.asarray(hidden[:, start : start + size]), position, cache, Causal())
        cache = commit(cache, update, jnp.full(len(hidden), size, jnp.int32))
        outputs.append(output)
        start += size
    return np.concatenate(outputs, axis=1), cache


def check_chunks(layer):
    """However a row is cut into forwards, the outputs are those of the recurrence, and the state keeps its size."""
    hidden = hidden_states(101, batch=2)
    want = layer.want(hidden)
    for sizes in ((101,), (64, 37), (37,) + (1,) * 27 + (37,)):
        got, cache = in_forwards(layer, hidden, sizes)
        close(got, want)
        assert cache.state.shape == layer.empty(2).state.shape and cache.state.dtype == jnp.float32
        np.testing.assert_array_equal(cache.length, 101)


class Tree:
    """A tree per row after a prefix of its own length."""

    def __init__(self, layer, seed=2):
        self.layer, self.prefix, self.nodes = layer, hidden_states(max(LENGTHS)), hidden_states(NODES, seed=seed)
        position = jnp.broadcast_to(jnp.arange(self.prefix.shape[1], dtype=jnp.int32)[None], self.prefix.shape[:2])
        # After its prefix each row has tokens that are rejected, non-finite ones in the last row.
        prefix = self.prefix.copy()
        prefix[2, 3:] = np.nan
        _, update = layer.run(jnp.asarray(prefix), position, layer.empty(), Causal())
        self.cache = commit(layer.empty(), update, jnp.asarray(LENGTHS, jnp.int32))
        self.ancestors = np.asarray(Ancestors.from_parents(jnp.asarray(PARENTS)).allowed)
        depth = self.ancestors.sum(2) - 1
        self.position = jnp.asarray(LENGTHS[:, None] + depth, jnp.int32)
        self.mask = Ancestors(jnp.asarray(self.ancestors))

    def run(self, nodes):
        return self.layer.run(jnp.asarray(nodes), self.position, self.cache, self.mask)

    def path(self, row, node):
        return np.flatnonzero(self.ancestors[row, node])

    def chain(self, row, node):
        """The hidden states that lead to a node, from the row's first token on."""
        return np.concatenate([self.prefix[row, : LENGTHS[row]], self.nodes[row, self.path(row, node)]])


def check_trees(layer):
    """A node's output is that of its path run as a chain, and so is what follows when that path is committed."""
    tree = Tree(layer)
    outputs, update = tree.run(tree.nodes)
    for row in range(BATCH):
        for node in range(NODES):
            close(outputs[row, node], layer.want(tree.chain(row, node)[None])[0, -1])

    accepted = np.array([9, 8, 0])
    count = np.array([len(tree.path(row, node)) for row, node in enumerate(accepted)])
    path = np.full((BATCH, NODES), NODES - 1)
    for row, node in enumerate(accepted):
        path[row, : count[row]] = tree.path(row, node)
    after = commit(tree.cache, update, jnp.asarray(count, jnp.int32), jnp.asarray(path, jnp.int32))
    np.testing.assert_array_equal(after.length, LENGTHS + count)
    following = hidden_states(3, seed=3)
    position = jnp.asarray((LENGTHS + count)[:, None] + np.arange(3), jnp.int32)
    got, _ = layer.run(jnp.asarray(following), position, after, Causal())
    for row, node in enumerate(accepted):
        want = layer.want(np.concatenate([tree.chain(row, node), following[row]])[None])
        close(got[row], want[0, -3:])
    return tree, outputs, update


def check_staged(layer):
    """Nodes staged by an earlier forward are attended to like those of the same forward; empty slots may be NaN."""
    tree = Tree(layer)
    want, _ = tree.run(tree.nodes)
    first, slots = 4, 6
    early, update = layer.run(
        jnp.asarray(tree.nodes[:, :first]),
        tree.position[:, :first],
        tree.cache,
        Ancestors(jnp.asarray(tree.ancestors[:, :first, :first])),
    )
    close(early, want[:, :first])
    nothing = jax.tree.map(lambda leaf: leaf + jnp.nan, layer.config.empty_update(BATCH, slots, jnp.float32))
    staged = nothing.place(update, jnp.arange(first, dtype=jnp.int32))
    beyond = jnp.full(first, slots, jnp.int32)
    for kept, dropped in zip(jax.tree.leaves(staged), jax.tree.leaves(staged.place(update, beyond)), strict=True):
        np.testing.assert_array_equal(kept, dropped)
    unfilled = np.zeros((BATCH, NODES - first, slots - first), bool)
    late = tree.ancestors[:, first:]
    allowed = np.concatenate([late[:, :, :first], unfilled, late[:, :, first:]], axis=2)
    position = jnp.pad(tree.position[:, :first], ((0, 0), (0, slots - first)))
    past = Staged(tree.cache, staged, position)
    got, _ = layer.run(
        jnp.asarray(tree.nodes[:, first:]), tree.position[:, first:], past, Ancestors(jnp.asarray(allowed))
    )
    close(got, want[:, first:])


def check_rows(layer):
    """A row does not depend on the others, and its non-finite values reach only tokens that attend to them."""
    tree = Tree(layer)
    want, update = tree.run(tree.nodes)
    for row in range(BATCH):
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], (tree.position, tree.cache, tree.mask))
        close(layer.run(jnp.asarray(tree.nodes[row : row + 1]), *alone)[0][0], want[row])

    nonfinite = tree.nodes.copy()
    nonfinite[0, 4, 2], nonfinite[1, 5, 0] = np.nan, np.inf
    got, nonfinite_update = tree.run(nonfinite)
    is_nonfinite = np.zeros((BATCH, NODES), bool)
    is_nonfinite[0], is_nonfinite[1] = tree.ancestors[0, :, 4], tree.ancestors[1, :, 5]
    np.testing.assert_array_equal(np.isnan(got).all(2), is_nonfinite)
    np.testing.assert_array_equal(np.asarray(got)[~is_nonfinite], np.asarray(want)[~is_nonfinite])

    # Three tokens of the non-finite chain are finite; the middle row commits none and stays bit-identical.
    count, path = jnp.asarray([3, 0, 2], jnp.int32), jnp.asarray([[0, 1, 3, 4]] * BATCH, jnp.int32)
    expected, after = (commit(tree.cache, new, count, path) for new in (update, nonfinite_update))
    for name in ("state", "tail", "length"):
        left, right = getattr(expected, name), getattr(after, name)
        if left is not None:
            np.testing.assert_array_equal(left, right)
            np.testing.assert_array_equal(right[1], getattr(tree.cache, name)[1])

    # In a chain, tokens before a non-finite token do not depend on it.
    chain = hidden_states(21)
    position = jnp.broadcast_to(jnp.arange(21, dtype=jnp.int32)[None], chain.shape[:2])
    finite, finite_update = layer.run(jnp.asarray(chain), position, layer.empty(), Causal())
    chain[1, 9] = np.nan
    got, new_update = layer.run(jnp.asarray(chain), position, layer.empty(), Causal())
    np.testing.assert_array_equal(np.isnan(got).any(2), (np.arange(BATCH) == 1)[:, None] & (np.arange(21) >= 9))
    np.testing.assert_array_equal(got[1, :9], finite[1, :9])
    count = jnp.asarray([21, 9, 0], jnp.int32)
    left, right = (commit(layer.empty(), new, count) for new in (finite_update, new_update))
    np.testing.assert_array_equal(left.state, right.state)


def check_long(layer, tolerance):
    """10,000 steps: the state stays finite and the outputs those of float64."""
    num_tokens = 10_000
    hidden = hidden_states(num_tokens, batch=1)

    @partial(jax.jit, static_argnums=1)
    def decode(hidden, num_tokens):
        def step(cache, inputs):
            output, update = layer.forward(inputs[:, None], cache.length[:, None], cache, Causal())
            return cache.commit(update, jnp.ones_like(cache.length)), output[:, 0]

        return jax.lax.scan(step, layer.empty(1), jnp.swapaxes(hidden, 0, 1), length=num_tokens)

    cache, got = decode(jnp.asarray(hidden), num_tokens)
    assert np.isfinite(cache.state).all()
    close(got[:, 0], layer.want(hidden)[0], tolerance)


def check_half_precision(layer):
    """In bfloat16, cache updates and tails are bfloat16 and the state is not; outputs are right to a few percent."""
    half = copy.copy(layer)
    half.run = jax.jit(half.forward)
    half.params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layer.params)
    half.weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), half.params)
    hidden = jnp.asarray(hidden_states(9), jnp.bfloat16)
    want, got, start = half.want(hidden.astype(jnp.float32)), [], 0
    cache = layer.config.empty_cache(BATCH, 0, jnp.bfloat16)
    for size, mask in ((1, Causal()), (5, Causal()), (3, Ancestors(jnp.tril(jnp.ones((1, 3, 3), bool))))):
        position = jnp.broadcast_to(start + jnp.arange(size, dtype=jnp.int32)[None], (BATCH, size))
        output, update = half.run(hidden[:, start : start + size], position, cache, mask)
        room = layer.config.empty_update(BATCH, size, jnp.bfloat16).place(update, jnp.arange(size, dtype=jnp.int32))
        assert jax.tree.map(jax.typeof, room) == jax.tree.map(jax.typeof, update)
        after = commit(cache, update, jnp.full(BATCH, size, jnp.int32))
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, cache)
        cache, start = after, start + size
        assert output.dtype == jnp.bfloat16 and cache.state.dtype == jnp.float32
        got.append(output.astype(jnp.float32))
    # Products of 13 terms rounded to 8 bits, half a dozen of them in sequence.
    close(np.concatenate(got, axis=1), want, 0.05)


def check_kept(layer):
    """A token that a layer did not run for leaves its state and its convolution as they were."""
    hidden = hidden_states(7)
    position = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32)[None], hidden.shape[:2])
    _, update = layer.run(jnp.asarray(hidden), position, layer.empty(), Causal())
    kept = np.array([[1, 1, 0, 1, 0, 1, 1], [0] * 7, [1] * 7], bool)
    garbage = jnp.asarray(~kept)
    update = jax.tree.map(
        lambda leaf: jnp.where(garbage.reshape(garbage.shape + (1,) * (leaf.ndim - 2)), jnp.nan, leaf), update
    )
    count = jnp.asarray([6, 5, 4], jnp.int32)
    got = commit(layer.empty(), dataclasses.replace(update, kept=jnp.asarray(kept)), count)
    path = jnp.asarray([[0, 1, 3, 5], [0] * 4, [0, 1, 2, 3]], jnp.int32)
    want = commit(layer.empty(), update, jnp.asarray([4, 0, 4], jnp.int32), path)
    np.testing.assert_array_equal(got.length, count)
    close(got.state, want.state)
    if want.tail is not None:
        np.testing.assert_array_equal(got.tail, want.tail)
