"""Draft trees equal a walk from parent to parent in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.decoding.tree import Tree, expansion

NODES = 9


def random_parents(rows=23):
    random = np.random.default_rng(0)
    return np.array([[-1, *(random.integers(0, node) for node in range(1, NODES))] for _ in range(rows)], np.int32)


def path_of(parents, node):
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, int(parents[path[0]]))
    return path


def check(tree, parents, row=0):
    for node in range(len(parents)):
        path = path_of(parents, node)
        assert tree.depth[row, node] == len(path) - 1
        np.testing.assert_array_equal(np.flatnonzero(tree.ancestors[row, node]), path)


def test_fixed_trees():
    for parents in random_parents():
        tree = Tree.fixed(parents.tolist())
        assert tree.num_nodes == NODES and not tree.is_chain
        np.testing.assert_array_equal(tree.parent[0], parents)
        check(tree, parents)


def test_trees_grown_per_row():
    parents = random_parents()
    for grow in (Tree.grown, jax.jit(Tree.grown)):
        tree = grow(jnp.asarray(parents))
        assert not tree.is_chain
        for row, mine in enumerate(parents):
            check(tree, mine, row)


@pytest.mark.parametrize("num_nodes", [1, 2, 7])
def test_chains(num_nodes):
    tree = Tree.chain(num_nodes)
    np.testing.assert_array_equal(tree.depth[0], np.arange(num_nodes))
    np.testing.assert_array_equal(tree.ancestors[0], np.tril(np.ones((num_nodes, num_nodes), bool)))
    assert tree.is_chain and Tree.fixed(range(-1, num_nodes - 1)).is_chain
    assert not Tree.fixed([-1, 0, 0]).is_chain


def test_expansion_numbers_level_by_level():
    assert expansion((3, 2, 1)) == (-1, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9)
    assert Tree.fixed(expansion((1, 1, 1))).is_chain


def test_path_to_a_node():
    """The nodes on the path, one per depth, then zeros; a tree per row or one for all."""
    parents, node = random_parents(), np.random.default_rng(1).integers(0, NODES, 23)
    grown = Tree.grown(jnp.asarray(parents)).path_to(jnp.asarray(node), NODES - 1)
    for row in range(23):
        path = path_of(parents[row], node[row])
        np.testing.assert_array_equal(grown[row], path + [0] * (NODES - len(path)))
    fixed = Tree.fixed(parents[0].tolist())
    longest = int(fixed.depth.max())
    shared = jax.jit(fixed.path_to, static_argnums=1)(jnp.arange(NODES), longest)
    for end in range(NODES):
        path = path_of(parents[0], end)
        np.testing.assert_array_equal(shared[end], path + [0] * (longest + 1 - len(path)))


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_the_deepest_accepted_path(share):
    """A node counts when it and all above it are accepted, the root in any case; of equals the first."""
    parents = random_parents()
    accepted = np.random.default_rng(2).random(parents.shape) < share
    got = jax.jit(lambda parent, accepted: Tree.grown(parent).accepted_path(accepted))(parents, jnp.asarray(accepted))
    for row in range(len(parents)):
        paths = [path_of(parents[row], node) for node in range(NODES)]
        whole = [path for path in paths if all(accepted[row, node] for node in path[1:])]
        assert got[row] == max(whole, key=len)[-1]  # `max` gives the first of equals
    if share == 1.0:
        fixed = Tree.fixed(parents[0].tolist()).accepted_path(jnp.ones((5, NODES), bool))
        np.testing.assert_array_equal(fixed, [got[0]] * 5)


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([], "must begin with its root"),
        ([0, 0], r"root, whose parent is -1, got parents \[0, 0\]"),
        ([-1, 0, 2], r"node 2 needs one in 0\.\.1, got 2; number the nodes level by level"),
        ([-1, 0, 3, 1], r"node 2 needs one in 0\.\.1, got 3"),
        ([-1, 0, -1], "node 2 needs one in .*, got -1"),
    ],
)
def test_bad_trees_are_refused(parents, message):
    with pytest.raises(ValueError, match=message):
        Tree.fixed(parents)


@pytest.mark.parametrize("branches", [(), (2, 0), (-1,)])
def test_levels_without_nodes(branches):
    with pytest.raises(ValueError, match="at least 1 child per node"):
        expansion(branches)
