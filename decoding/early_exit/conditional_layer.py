"""Runs a layer only if some token needs it: the primitive of every layer policy that skips layers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decodax.layers.attention.mask import Mask
from decodax.layers.kv_cache.contract import MarksTokens
from decodax.models.model import Model, Params


def run_layer(
    model: Model,
    params: Params,
    index: int,
    hidden: Float[Array, "B T D"],
    position: Int[Array, "B T"],
    caches: tuple[Any, ...],
    mask: Mask | None,
    active: Bool[Array, "#B #T"] | Bool[Array, ""],
    *,
    otherwise: Any = None,
    row_length: Int[Array, "B #T"] | None = None,
) -> tuple[Float[Array, "B T D"], Any, Bool[Array, ""]]:
    """Runs layer `index` over T new tokens per row, for those that are `active`; the others keep their hidden states.

    Gives the hidden states, the layer's cache update, and whether it ran. If no token is active, the layer computes
    nothing. The cache updates of tokens that are not active have no meaning: the caller makes sure that no query
    attends to them.

    hidden, position: of the new tokens.
    caches, mask: what they attend to.
    active: the tokens that run the layer.
    otherwise: the cache update if the layer does not run; zeros by default.
    row_length: tokens that each row will have.
    """

    def run(hidden: Array) -> tuple[Array, Any]:
        layers = (index, index + 1)
        out = model.apply(params, hidden, position, caches, mask=mask, layers=layers, row_length=row_length)
        return out.hidden, out.cache_updates[0]

    updates = otherwise
    if updates is None:
        shapes = jax.eval_shape(run, hidden)[1]
        updates = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    ran = jnp.any(active)
    new, updates = jax.lax.cond(ran, run, lambda hidden: (hidden, updates), hidden)
    if active.ndim:
        new = jnp.where(active[..., None], new, hidden)
    return new, updates, ran


def mark(cache: Any, updates: Any, ran: Bool[Array, "B T"]) -> Any:
    """A layer's cache update, in which tokens that did not run the layer are marked, if its cache supports marks.

    Other caches hold them like any token; a layer policy that skips layers makes sure that no query attends to them.
    """
    if isinstance(cache, MarksTokens) and cache.marks_tokens:
        return dataclasses.replace(updates, kept=ran)
    return updates
