"""Implements low-rank adapters (LoRA): weight + scale x up @ down, with a few per cent of the weight's numbers.

LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685. Here the adapter is always merged into weights,
in each training step or once after loading, so that layers do not depend on it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

Params = dict[str, Any]
MATRICES = ("query", "key", "value", "out", "gate", "up", "down")


def low_rank_change(params: Params, rank: int, key: Array, names: Sequence[str] = MATRICES) -> Params:
    """An initial adapter for every layer's matrices of these names, which changes nothing: `down` is random, `up` zero.

    It is nested like `params`, with {"down": [rank, inputs], "up": [outputs, rank]} in place of a matrix.

    params: of the model.
    rank: of the adapter.
    key: of the random numbers.
    names: of the matrices.
    Raises ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")

    def visit(subtree: Params, key: Array) -> Params:
        change: Params = {}
        for index, (name, leaf) in enumerate(sorted(subtree.items())):
            own = jax.random.fold_in(key, index)
            if isinstance(leaf, dict):
                inner = visit(leaf, own)
                change |= {name: inner} if inner else {}
            elif name in names and leaf.ndim == 2:
                outputs, inputs = leaf.shape
                down = jax.random.normal(own, (rank, inputs), jnp.float32) / inputs**0.5
                change[name] = {"down": down, "up": jnp.zeros((outputs, rank), jnp.float32)}
        return change

    blocks = {name: leaf for name, leaf in params.items() if name.startswith("blocks_")}
    return visit(blocks, key)


def merged(params: Params, change: Params, scale: float = 1.0) -> Params:
    """`params` with the adapter merged; arrays without an adapter are returned as they are."""

    def visit(subtree: Params, change: Params) -> Params:
        out = dict(subtree)
        for name, entry in change.items():
            if isinstance(subtree[name], dict):
                out[name] = visit(subtree[name], entry)
            else:
                added = scale * (entry["up"].astype(jnp.float32) @ entry["down"].astype(jnp.float32))
                out[name] = (subtree[name].astype(jnp.float32) + added).astype(subtree[name].dtype)
        return out

    return visit(params, change)
