"""Pytree dataclasses: class and static fields belong to the tree structure, and unflattening runs no checks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.core.pytree import dataclass, static


@dataclass
class Doubled:
    value: jax.Array

    def __call__(self):
        return self.value * 2


@dataclass
class Halved:
    value: jax.Array

    def __call__(self):
        return self.value / 2


@dataclass
class Named:
    inner: Doubled
    name: str = static()
    scale: jax.Array | None = None
    size: int = static(default=7)

    def __post_init__(self):
        if not hasattr(self.inner.value, "shape"):
            raise ValueError("inner must hold an array")


def test_two_classes_with_the_same_fields_are_two_structures():
    one, other = Doubled(jnp.ones(3)), Halved(jnp.ones(3))
    assert jax.tree.structure(one) != jax.tree.structure(other)
    assert jax.tree.structure(one) == jax.tree.structure(Doubled(jnp.zeros(5)))
    call = jax.jit(lambda node: node())
    np.testing.assert_array_equal(call(one), [2, 2, 2])
    np.testing.assert_array_equal(call(other), [0.5, 0.5, 0.5])


def test_static_fields_are_part_of_the_structure():
    node = Named(Doubled(jnp.ones(3)), "a", jnp.zeros(2))
    assert len(jax.tree.leaves(node)) == 2
    assert jax.tree.structure(node) != jax.tree.structure(dataclasses.replace(node, name="b"))
    assert jax.tree.structure(node) != jax.tree.structure(dataclasses.replace(node, size=5))
    assert jax.tree.structure(node) != jax.tree.structure(dataclasses.replace(node, scale=None))
    assert jax.tree.structure(node) == jax.tree.structure(dataclasses.replace(node, name="a", size=7))


def test_flattening_and_unflattening_give_the_same():
    node = Named(Doubled(jnp.arange(3)), "a", jnp.zeros(2), 11)
    back = jax.jit(lambda tree: tree)(node)
    assert type(back) is Named and (back.name, back.size) == ("a", 11)
    np.testing.assert_array_equal(back.inner.value, [0, 1, 2])
    np.testing.assert_array_equal(back.scale, [0, 0])


def test_leaves_are_named_by_their_fields():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(Named(Doubled(jnp.ones(3)), "a", 1.0))]
    assert paths == [".inner.value", ".scale"]


def test_unflattening_takes_any_leaves_without_checks():
    node = Named(Doubled(jnp.ones(3)), "a", jnp.zeros(2))
    with pytest.raises(ValueError, match="must hold an array"):
        Named(Doubled("x"), "a")
    shapes = jax.tree.map(lambda leaf: "x" * leaf.size, node)
    assert shapes.inner.value == "xxx" and shapes.scale == "xx"
    assert jax.eval_shape(lambda tree: tree, node).inner.value.shape == (3,)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Doubled(jnp.ones(3)).value = None
