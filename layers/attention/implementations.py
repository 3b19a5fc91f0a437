"""Picks an implementation of attention from a table: the first that supports the operands.

A table is a dictionary in the order of preference whose last entry, "xla", supports everything. `attend.py` has that of
keys and values, `attend_absorbed.py` and `attend_expanded.py` those of latent attention.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Array

from decodax.layers.attention.gradients import with_gradients_of
from decodax.layers.execution import Execution


@dataclass(frozen=True)
class AttentionImplementation:
    """One way to compute attention. Operands are arrays, or shapes, that end with the positions, the mask, the cache.

    unsupported_reason: of (*operands, execution), why it does not support them; None if it does. Raises
        NotImplementedError if `execution` asks for a kernel that does not. Not asked without a mesh if it needs one.
    run: of (*operands, execution=, **options), the attention outputs and the log-sum-exps of the scores.
    needs_mesh: whether it splits the operands over devices.
    """

    unsupported_reason: Callable[..., str | None]
    run: Callable[..., tuple[Array, Array]]
    needs_mesh: bool = False


_log = logging.getLogger(__name__)
Table = Mapping[str, AttentionImplementation]


def always_supported(*operands: Any) -> None:
    """The reason against plain JAX: there is none."""


def select_implementation(table: Table, operands: tuple[Any, ...], execution: Execution) -> str:
    """The name of the first implementation that supports the operands; the reasons against the others are logged."""
    against = []
    for name, entry in table.items():
        if entry.needs_mesh and execution.mesh is None:
            continue
        reason = entry.unsupported_reason(*operands, execution)
        if reason is None:
            _log.debug("attention runs %r%s", name, "".join(f"; not {other}: {why}" for other, why in against))
            return name
        against.append((name, reason))
    raise AssertionError("the last implementation of a table supports everything")


def attention_by(
    table: Table, operands: tuple[Any, ...], execution: Execution, **options: Any
) -> Callable[..., tuple[Array, Array]]:
    """The first implementation that supports the operands, as a function of them, with the gradients of plain JAX.

    table: of implementations.
    operands: of the attention.
    execution: which kernels run, over which devices.
    options: of `run`.
    """
    plain = partial(table["xla"].run, execution=execution, **options)
    name = select_implementation(table, operands, execution)
    if name == "xla":
        return plain
    return with_gradients_of(plain, partial(table[name].run, execution=execution, **options))


def on_one_device(table: Table, execution: Execution, **options: Any) -> Callable[..., tuple[Array, Array]]:
    """`attention_by` as a function of the operands that one device has, as within `execution.per_device`."""

    def attention(*operands: Any) -> tuple[Array, Array]:
        return attention_by(table, operands, execution.on_one_device, **options)(*operands)

    return attention


def cache_unsupported_reason(bare: Any, slots: str, query: Any) -> str | None:
    """Why a kernel does not read a cache; None if it does, or if there is no cache.

    bare: the cache, without staged tokens.
    slots: the property with what the kernel reads (`HasSlots`).
    query: the queries.
    """
    found = None if bare is None else getattr(bare, slots, None)
    if bare is not None and found is None:
        why = "marks tokens" if getattr(bare, "marks_tokens", False) else f"has no {slots} for it"
        return f"the cache ({type(bare).__name__}) {why}"
    if found is not None and found.first.dtype != query.dtype:
        return f"the cache holds {found.first.dtype} and the queries are {query.dtype}"
    return None


def heads_unsupported_reason(num_heads: int, execution: Execution) -> str | None:
    """Why heads that share no key-value heads do not divide over the devices; None if they do."""
    num_shards = execution.num_shards("N")
    return f"{num_heads} heads do not divide over {num_shards} devices" if num_heads % num_shards else None
