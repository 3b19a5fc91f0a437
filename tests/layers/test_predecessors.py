"""Each token finds its predecessors: left neighbours, ancestors in a tree, staged or committed tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.attention.mask import Ancestors, Causal, Window
from decodax.layers.attention.predecessors import predecessors, tail_after

BATCH, SIZE, WIDTH = 3, 2, 4
LENGTHS = np.array([0, 2, 11])  # the second row's tail reaches before its first token
PARENTS = np.array([[-1, 0, 0, 2, 1, 3, 5], [-1, 0, 1, 2, 3, 3, 4], [-1, 0, 0, 0, 3, 4, 5]])  # a tree per row
DEPTHS = np.array([[0, 1, 1, 2, 2, 3, 4], [0, 1, 2, 3, 4, 4, 5], [0, 1, 1, 1, 2, 3, 4]])


def example(num_new, dtype=np.float32):
    """What was committed, the tail of it, and the columns of new tokens: no two numbers are equal."""
    random = np.random.default_rng(0)
    committed = [random.standard_normal((length, SIZE)).astype(dtype) for length in LENGTHS]
    padded = [np.concatenate([np.zeros((WIDTH - 1, SIZE), dtype), row]) for row in committed]
    tail = np.stack([row[len(row) - WIDTH + 1 :] for row in padded])
    return padded, jnp.asarray(tail), random.standard_normal((BATCH, num_new, SIZE)).astype(dtype)


def walked(padded, columns, parents):
    """By definition: from each node up to the root, then through the committed tokens."""
    want = np.zeros((*columns.shape[:2], WIDTH, SIZE), columns.dtype)
    for row in range(BATCH):
        for node in range(columns.shape[1]):
            path, at = [], node
            while at >= 0:
                path.insert(0, columns[row, at])
                at = parents[row][at]
            want[row, node] = np.concatenate([padded[row], np.stack(path)])[-WIDTH:]
    return want


find = jax.jit(predecessors)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("num_new", [1, 2, 6])
def test_a_chain(num_new, dtype):
    padded, tail, columns = example(num_new, dtype)
    parents = np.broadcast_to(np.arange(num_new) - 1, (BATCH, num_new))
    position = jnp.asarray(LENGTHS[:, None] + np.arange(num_new))
    want = walked(padded, columns, parents)
    for mask in (Causal(), Causal() & Window(WIDTH), Ancestors.from_parents(jnp.asarray(parents))):
        np.testing.assert_array_equal(find(jnp.asarray(columns), position, mask, tail, None), want)


def test_a_plain_chain_is_shifts_alone():
    """Temporary memory is a few times the columns, and never tokens by tokens."""
    _, tail, columns = example(1)
    columns = jnp.broadcast_to(jnp.asarray(columns), (BATCH, 512, SIZE))
    position = jnp.zeros((BATCH, 512), jnp.int32)
    made = jax.make_jaxpr(lambda *arrays: predecessors(*arrays, None))(columns, position, Causal(), tail)
    sizes = [np.prod(out.aval.shape) for equation in made.eqns for out in equation.outvars]
    assert max(sizes) == columns.size * WIDTH


@pytest.mark.parametrize("num_staged", [0, 1, 3, 6])
def test_trees_with_their_first_nodes_staged(num_staged):
    """Every row has a tree of its own; staged nodes are in any order, between slots that are never read."""
    padded, tail, columns = example(7)
    allowed = np.array(Ancestors.from_parents(jnp.asarray(PARENTS)).allowed)
    position = LENGTHS[:, None] + DEPTHS
    want = walked(padded, columns, PARENTS)[:, num_staged:]
    if not num_staged:
        got = find(jnp.asarray(columns), jnp.asarray(position), Ancestors(jnp.asarray(allowed)), tail, None)
        np.testing.assert_array_equal(got, want)
        return
    shuffled = np.random.default_rng(1).permutation(num_staged)
    empty = np.full((BATCH, 2, SIZE), np.nan, np.float32)
    staged = np.concatenate([empty, columns[:, shuffled]], axis=1)
    staged_position = np.concatenate([position[:, :2], position[:, shuffled]], axis=1)
    unread = np.zeros((BATCH, 7 - num_staged, 2), bool)
    readable = [unread, allowed[:, num_staged:][:, :, shuffled], allowed[:, num_staged:, num_staged:]]
    mask = Ancestors(jnp.asarray(np.concatenate(readable, axis=2))) & Causal()
    new = jnp.asarray(columns[:, num_staged:]), jnp.asarray(position[:, num_staged:])
    got = find(*new, mask, tail, (jnp.asarray(staged), jnp.asarray(staged_position)))
    np.testing.assert_array_equal(got, want)


def test_a_nonfinite_token_reaches_only_tokens_after_it():
    padded, tail, columns = example(7)
    columns[0, 2] = np.nan
    position, mask = jnp.asarray(LENGTHS[:, None] + DEPTHS), Ancestors.from_parents(jnp.asarray(PARENTS))
    got = np.asarray(find(jnp.asarray(columns), position, mask, tail, None))
    np.testing.assert_array_equal(got, walked(padded, columns, PARENTS))  # equal where both are NaN
    assert np.isfinite(got[1:]).all() and np.isfinite(got[0, [0, 1, 4]]).all()


@pytest.mark.parametrize("path", [None, np.array([[0, 2, 3, 5, 6], [0, 1, 2, 3, 4], [0, 3, 4, 5, 6]])])
@pytest.mark.parametrize("count", [(0, 0, 0), (1, 0, 2), (5, 3, 4)])
def test_the_tail_after_a_commit(count, path):
    padded, tail, columns = example(7)
    after = jax.jit(tail_after)(tail, jnp.asarray(columns), jnp.array(count), None if path is None else jnp.array(path))
    for row, accepted in enumerate(count):
        nodes = np.arange(7) if path is None else path[row]
        want = np.concatenate([padded[row], columns[row, nodes[:accepted]]])[-WIDTH + 1 :]
        np.testing.assert_array_equal(after[row], want)
    assert after.dtype == tail.dtype


def test_a_width_of_one_keeps_nothing():
    columns = jnp.ones((BATCH, 5, SIZE))
    tail = jnp.zeros((BATCH, 0, SIZE))
    got = predecessors(columns, jnp.asarray(LENGTHS[:, None] + np.arange(5)), Causal(), tail, None)
    assert got.shape == (BATCH, 5, 1, SIZE)
    assert tail_after(tail, columns, jnp.array([5, 0, 2])).shape == (BATCH, 0, SIZE)
