"""Makes frozen dataclasses pytrees: arrays are the leaves, fields marked `static` belong to the tree structure.

Used in place of `flax.struct.dataclass` and `jax.tree_util.register_dataclass` for two reasons.

With those, on JAX 0.10 to 0.12, two classes whose fields have the same shapes have equal tree structures. A jitted
function that gets sometimes one class and sometimes the other (two masks, two logits processors) then finds the wrong
compiled code whenever their hashes, which change from process to process, happen to collide: seen in two of nine runs
of a test, as wrong numbers and no error. The comparison of a node registered by hand includes its class.

Second, JAX rebuilds trees around values that are not arrays (shapes, None, its own markers), which a `__post_init__`
or a checker of annotations would refuse. Rebuilding here does not run `__init__`.
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

Class = TypeVar("Class", bound=type)


def static(**options: Any) -> Any:
    """A field that is no array: hashable, fixed at compile time; a new value recompiles.

    options: those of `dataclasses.field`.
    """
    return dataclasses.field(metadata={"static": True}, **options)


def stacked(axis_name: str) -> Any:
    """A field whose arrays all have one more axis, of this name, before those that their classes declare."""
    return dataclasses.field(metadata={"stacked": axis_name})


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
