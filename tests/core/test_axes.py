"""Axes of a state's arrays are those that its classes declare, whatever kind of class they are."""

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
import pytest
from jaxtyping import Array, Float, Int

from decodax.core import pytree
from decodax.core.axes import declared_axes, required_axes


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, np.float32)


@pytree.dataclass
class Own:
    key: Float[Array, "B K S H"]
    either: Float[Array, "B N"] | Float[Array, "B N H"] | None
    count: Int[Array, ""]
    size: int = pytree.static()


@flax.struct.dataclass
class OfFlax:
    scale: Float[Array, "B #K room"]


class Pair(NamedTuple):
    token: Int[Array, " B"]
    caches: Any


@pytree.dataclass
class Rows:
    counts: Float[Array, "*rows V"]


@pytree.dataclass
class Stack:
    each: Any = pytree.stacked("L")


@pytree.dataclass
class Silent:
    """Annotations that say nothing, and a method that does."""

    values: dict
    length: Any

    def axes(self):
        return dataclasses.replace(self, values={"a": "B V", "b": "S other"}, length="B")


OWN = Own(shape(2, 3, 4, 5), shape(2, 3), shape(), 7)
KEY, EITHER = ("B", "K", "S", "H"), ("B", "N")


@pytest.mark.parametrize(
    ("tree", "wanted"),
    [
        (OWN, [KEY, EITHER, ()]),
        (dataclasses.replace(OWN, either=None), [KEY, ()]),
        (dataclasses.replace(OWN, either=shape(2, 3, 4)), [KEY, ("B", "N", "H"), ()]),
        (OfFlax(shape(2, 1, 3)), [("B", "K", "_")]),
        (Pair(shape(2), (OWN, None)), [("B",), KEY, EITHER, ()]),
        ((Rows(shape(2, 9)), Rows(shape(2, 3, 9))), [("B", "V"), ("B", "_", "V")]),
        (Stack(Pair(shape(4, 2), OfFlax(shape(4, 2, 1, 3)))), [("L", "B"), ("L", "B", "K", "_")]),
        (Silent({"a": shape(2, 9), "b": shape(4, 1)}, shape(2)), [("B", "V"), ("S", "_"), ("B",)]),
        (Stack(Silent({"a": shape(4, 2, 9), "b": shape(4, 4, 1)}, shape(4, 2))),
         [("L", "B", "V"), ("L", "S", "_"), ("L", "B")]),
        ({"free": shape(3), "known": OfFlax(shape(2, 1, 3))}, [None, ("B", "K", "_")]),
        (dataclasses.replace(OWN, key=shape(2, 3)), [None, EITHER, ()]),
    ],
)  # fmt: skip
def test_axes_are_declared(tree, wanted):
    assert declared_axes(tree) == wanted
    assert len(jax.tree.leaves(tree)) == len(wanted)
    if None not in wanted:
        assert required_axes(tree, "why") == wanted


def test_postponed_annotations_are_read():
    """`from __future__ import annotations` turns them into text."""
    source = """
from __future__ import annotations
from jaxtyping import Array, Float
from decodax.core import pytree

@pytree.dataclass
class Postponed:
    key: Float[Array, "B K S H"]
"""
    module = type(pytest)("postponed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "postponed", module)
        exec(compile(source, "postponed.py", "exec", dont_inherit=True), module.__dict__)
        made = module.Postponed(shape(2, 3, 4, 5))
        assert isinstance(dataclasses.fields(made)[0].type, str)
        assert declared_axes(made) == [KEY]


def test_places_without_axes_are_named():
    with pytest.raises(ValueError, match=r"^they are needed, and dict\['a'\]\[0\], \['b'\]\[0\] has none: annotate"):
        required_axes({"a": (shape(2), OWN), "b": [shape(3, 3)]}, "they are needed")
