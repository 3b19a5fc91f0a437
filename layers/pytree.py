"""Frozen dataclasses that JAX can look into: arrays are the leaves, everything marked `static` is part of the type.

Used in place of `flax.struct.dataclass` and `jax.tree_util.register_dataclass` for two reasons.

With those, on JAX 0.10 to 0.12, two classes whose fields have the same shapes have equal tree structures, whatever the
classes are. A jitted function that gets now one class and now the other (two masks, two logits processors) then finds
the wrong compiled code whenever their hashes, which change from process to process, happen to collide: seen in two of
nine runs of a test, as wrong numbers and no error. A node registered by hand is compared with its class.

And JAX rebuilds trees around things that are not arrays (shapes, None, markers of its own), which a `__post_init__` or
a checker of annotations would refuse. Rebuilding here does not run `__init__`.
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

Class = TypeVar("Class", bound=type)


def static(**options: Any) -> Any:
    """A field that is no array: hashable, fixed when a function is compiled, a new value compiles again.

    `options` are those of `dataclasses.field`.
    """
    return dataclasses.field(metadata={"static": True}, **options)


def stacked(letter: str) -> Any:
    """A field whose arrays all have one more axis, in front of those that their classes declare; its letter."""
    return dataclasses.field(metadata={"stacked": letter})


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static, stacked))
def dataclass(cls: Class) -> Class:
    """Makes `cls` a frozen dataclass and a pytree node; fields are leaves or subtrees, unless made with `static`.

    `dataclasses.replace` gives a changed copy.
    """
    data_class = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(data_class)
    leaves = tuple(field.name for field in fields if not field.metadata.get("static", False))
    statics = tuple(field.name for field in fields if field.metadata.get("static", False))

    def flatten(node: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(node, name) for name in leaves), tuple(getattr(node, name) for name in statics)

    def flatten_with_keys(node: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        children, static_values = flatten(node)
        keys = (jax.tree_util.GetAttrKey(name) for name in leaves)
        return tuple(zip(keys, children, strict=True)), static_values

    def unflatten(static_values: tuple[Any, ...], children: Any) -> Any:
        node = object.__new__(data_class)
        for name, value in (*zip(leaves, children, strict=True), *zip(statics, static_values, strict=True)):
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(data_class, flatten_with_keys, unflatten, flatten)
    return data_class
