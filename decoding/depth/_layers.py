"""One layer that runs only if some token wants it: the primitive of every depth that skips layers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decodax.layers.attention.mask import Mask
from decodax.layers.kv_cache._contract import MarksTokens
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
    """Layer `index` over T new tokens per row, for those that are `active`; the others keep their hidden states.

    Gives the hidden states, the layer's rows, and whether it ran. If no token is active nothing of the layer is
    computed, and the rows are `otherwise` (zeros by default). The rows of tokens that are not active hold no meaning:
    who passes them on makes sure that nobody reads them.
    """

    def run(hidden: Array) -> tuple[Array, Any]:
        layers = (index, index + 1)
        out = model.apply(params, hidden, position, caches, mask=mask, layers=layers, row_length=row_length)
        return out.hidden, out.rows[0]

    rows = otherwise
    if rows is None:
        shapes = jax.eval_shape(run, hidden)[1]
        rows = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    wanted = jnp.any(active)
    new, rows = jax.lax.cond(wanted, run, lambda hidden: (hidden, rows), hidden)
    if active.ndim:
        new = jnp.where(active[..., None], new, hidden)
    return new, rows, wanted


def mark(cache: Any, rows: Any, ran: Bool[Array, "B T"]) -> Any:
    """A layer's rows, with those of tokens that did not run it marked if its cache knows of such tokens.

    To other caches they are tokens like any; who leaves out layers makes sure that nobody reads them there.
    """
    if isinstance(cache, MarksTokens) and cache.marks_tokens:
        return dataclasses.replace(rows, kept=ran)
    return rows
