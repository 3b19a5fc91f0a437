"""Defines new tokens and operand checks for the decode kernels (flash_decode, paged_decode, gather_decode).

A query of a decoding step attends to cached tokens and to new tokens of the same forward: itself, and those before it
in a chain or a token tree. New tokens are not in any cache yet.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

MAX_STEP_TOKENS = 64  # new tokens per row up to which a forward is a decoding step, bound by reading the cache
MAX_NEW_TOKENS = 128


class NewTokens(NamedTuple):
    """Keys and values of U new tokens (at most 128), and which of them each query attends to.

    Tokens staged by earlier forwards may precede those of this one, so U is T or more. A value must be finite if any
    query attends to it; a token that no query attends to may hold anything.
    """

    key: Float[Array, "B K U H"]
    value: Float[Array, "B K U I"]
    allowed: Bool[Array, "B T U"]


def check_operands(
    kernel: str, query: Any, num_kv_heads: int, head_size: int, value_size: int, new: NewTokens | None
) -> None:
    """Raises ValueError if the queries and the new tokens do not fit the cache or each other.

    kernel: its name, for messages.
    query, new: the operands.
    num_kv_heads, head_size, value_size: of the cache.
    """
    batch, num_queries, num_heads, query_size = query.shape
    if not 1 <= num_queries <= MAX_STEP_TOKENS:
        raise ValueError(
            f"{kernel} takes 1 to {MAX_STEP_TOKENS} queries (T) per row, got {num_queries}: use flash_prefill for more"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"the {num_heads} query heads must be a multiple of the {num_kv_heads} key-value heads")
    if query_size != head_size:
        raise ValueError(f"queries and keys must have the same head size (H), got {query_size} and {head_size}")
    if new is None:
        return
    num_new = new.key.shape[2]
    expected = {
        "key": (batch, num_kv_heads, num_new, head_size),
        "value": (batch, num_kv_heads, num_new, value_size),
        "allowed": (batch, num_queries, num_new),
    }
    for name, shape in expected.items():
        if getattr(new, name).shape != shape:
            raise ValueError(f"new.{name} must have shape {shape} beside this cache, got {getattr(new, name).shape}")
    if not 1 <= num_new <= MAX_NEW_TOKENS:
        raise ValueError(f"new tokens (U) must be 1 to {MAX_NEW_TOKENS}, got {num_new}; commit some to the cache first")


def check_range(name: str, values: Any, lowest: int, highest: int, advice: str) -> None:
    """Raises ValueError for integers outside lowest .. highest; does nothing for traced values.

    name: of the operand, for the message.
    values: to check.
    lowest, highest: their range.
    advice: end of the message.
    """
    if isinstance(values, Tracer) or not isinstance(values, jax.Array | np.ndarray) or values.size == 0:
        return
    concrete = np.asarray(values)
    if concrete.min() < lowest or concrete.max() > highest:
        raise ValueError(f"{name} must be in {lowest}..{highest}, got {concrete.min()}..{concrete.max()}: {advice}")
