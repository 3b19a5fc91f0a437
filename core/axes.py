"""Declares the logical axes: the letters that name array axes in shapes, einsums and comments everywhere in decodax.

| logical axis | axis                            | logical axis | axis                                  |
|--------|---------------------------------|--------|---------------------------------------|
| B      | rows of a batch                 | F      | feed-forward width                    |
| T      | query tokens of one forward     | V      | vocabulary                            |
| S      | cached tokens (capacity)        | E      | experts                               |
| N      | query heads                     | X      | experts per token                     |
| K      | key-value heads                 | C      | draft tokens                          |
| G      | query heads per key-value head  | L      | layers                                |
| H      | head size                       | D      | model width                           |
| R      | rank of a latent                | W      | taps of a short convolution           |

Weight descriptions use only letters of `AXES`; sharding rules map them to mesh axes.

Every array of a state (a cache, an update, what a drafter or a layer policy carries) has its axes as well:
`declared_axes` reads them from the shapes that classes declare. So whatever shards a state, or moves its rows, needs no
second description.
"""

import dataclasses
import typing
from functools import lru_cache
from typing import Any

import jax

AXES = frozenset("BTSNKGHDFVEXCLRW")
OTHER = "_"  # the name of an axis that is none of them


def declared_axes(tree: Any) -> list[tuple[str, ...] | None]:
    """The logical axes of every array (or shape) in a state, in the order of its leaves; None where none are declared.

    An array is a field of a dataclass or a NamedTuple with its shape, as in `key: Float[Array, "B K S H"]`; of a union
    the first that fits counts. A class whose annotations do not say it has a method `axes()`, which gives the node with
    a text such as "B K S H" in place of every array. A scalar needs no declaration.
    """
    return _axes_of(tree, None, ())


def required_axes(tree: Any, why: str) -> list[tuple[str, ...]]:
    """`declared_axes`; raises ValueError, with the places and `why` they are needed, for arrays without any."""
    axes = declared_axes(tree)
    known = [names for names in axes if names is not None]
    if len(known) == len(axes):
        return known
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    missing = [path for path, names in zip(paths, axes, strict=True) if names is None]
    raise ValueError(
        f"{why}, and {type(tree).__name__}{', '.join(missing[:4])} has none: annotate the field with its shape, as in "
        'Float[Array, "B K S H"], or give its class a method axes()'
    )


def _axes_of(node: Any, declared: Any, outer: tuple[str, ...]) -> list[tuple[str, ...] | None]:
    """outer: the axes of a stack (`pytree.stacked`), before those that are declared."""
    if node is None:
        return []
    if callable(getattr(node, "axes", None)):
        return [_named(text, outer) for text in jax.tree.leaves(node.axes())]
    if dataclasses.is_dataclass(node):
        hints, found = _hints(type(node)), []
        for field in dataclasses.fields(node):
            if not field.metadata.get("static", False):
                inner = (*outer, *field.metadata.get("stacked", ()))
                found += _axes_of(getattr(node, field.name), hints.get(field.name), inner)
        return found
    names = getattr(node, "_fields", None)
    if names is not None:  # a NamedTuple
        hints = _hints(type(node))
        return [axes for name in names for axes in _axes_of(getattr(node, name), hints.get(name), outer)]
    if jax.tree_util.all_leaves([node]):
        return [_axes_of_array(declared, node.ndim, outer)]
    children = jax.tree.leaves(node, is_leaf=lambda child: child is not node)
    return [axes for child in children for axes in _axes_of(child, None, outer)]


@lru_cache(maxsize=256)
def _hints(cls: type) -> dict[str, Any]:
    """The annotations of a class; of one with postponed annotations, those that can be read."""
    try:
        return typing.get_type_hints(cls)
    except Exception:  # a name that is not there at run time; jaxtyping's own errors
        return dict(getattr(cls, "__annotations__", {}))


def _axes_of_array(declared: Any, ndim: int, outer: tuple[str, ...]) -> tuple[str, ...] | None:
    """One name per dimension from a jaxtyping annotation, or the first of a union that fits."""
    own = ndim - len(outer)
    if own == 0:
        return outer
    for option in (declared, *typing.get_args(declared)):
        names = getattr(option, "dim_str", "").split()
        if names and names[0] == "*rows":  # rows, and perhaps nodes of a tree
            names = ["B", *[OTHER] * (own - len(names)), *names[1:]]
        if len(names) == own:
            return _named(" ".join(names), outer)
    return None


def _named(text: str, outer: tuple[str, ...]) -> tuple[str, ...]:
    bare = (name.lstrip("#") for name in text.split())
    return (*outer, *(name if name in AXES else OTHER for name in bare))
