"""Runs the layers in order, each for all tokens, for none, or for the active ones: in decoding and in prefill."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decodax.core import pytree
from decodax.decoding.chunked_prefill import prefill_state
from decodax.decoding.drafters.contract import Proposal
from decodax.decoding.drafters.wider_proposals import LayerProposal
from decodax.decoding.early_exit.conditional_layer import mark, run_layer
from decodax.decoding.early_exit.contract import TargetForward
from decodax.decoding.state import DecodeState
from decodax.layers.attention.mask import Mask
from decodax.models.model import Model, Params
from decodax.models.transformer import Forward

# Which tokens run a layer, given its index and its input: all, none (the caches are not read), or those marked.
Active = Callable[[int, Float[Array, "B T D"]], "bool | Bool[Array, '#B #T']"]


@pytree.dataclass
class Stack:
    """The result of a run over the layers.

    forward: hidden states and cache updates.
    layers_run: layers that the batch ran.
    row_layers: those that each row needed.
    """

    forward: Forward
    layers_run: Int[Array, ""]
    row_layers: Int[Array, " B"]


def run_stack(
    model: Model,
    params: Params,
    inputs: Int[Array, "B T"] | Float[Array, "B T D"],
    position: Int[Array, "B T"],
    caches: tuple[Any, ...],
    active: Active,
    *,
    mask: Mask | None = None,
    row_length: Int[Array, "B #T"] | None = None,
    capture: tuple[int, ...] = (),
) -> Stack:
    """Runs T new tokens per row through the layers that are `active`; a token passes the others unchanged.

    Every layer gives a cache update, so that all caches have the same length. The updates of tokens that did not run it
    have no meaning, and change nothing in a cache that supports marks (a recurrent state always does).

    inputs, position: of the new tokens; ids, or hidden states before the first layer.
    caches, mask: what they attend to.
    active: which tokens run a layer.
    row_length: tokens that each row will have.
    capture: after how many layers the hidden states are needed too.
    """
    hidden = model.embed(params, inputs, position) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs
    nothing = model.empty_update(position.shape[0], position.shape[1], hidden.dtype)
    updates, captured = [], {0: hidden} if 0 in capture else {}
    layers_run, row_layers = jnp.int32(0), jnp.zeros(position.shape[0], jnp.int32)
    for index in range(model.config.num_layers):
        tokens = active(index, hidden)
        if tokens is False:
            updates.append(mark(caches[index], nothing[index], jnp.zeros(position.shape, bool)))
        elif tokens is True:
            layers = (index, index + 1)
            out = model.apply(params, hidden, position, caches, mask=mask, layers=layers, row_length=row_length)
            hidden = out.hidden
            updates += out.cache_updates
            layers_run, row_layers = layers_run + 1, row_layers + 1
        else:
            hidden, new, ran = run_layer(
                model, params, index, hidden, position, caches, mask, tokens, row_length=row_length
            )
            updates.append(mark(caches[index], new, jnp.broadcast_to(tokens, position.shape)))
            layers_run = layers_run + ran.astype(jnp.int32)
            row_layers = row_layers + jnp.any(tokens, axis=1).astype(jnp.int32)
        if index + 1 in capture:
            captured[index + 1] = hidden
    return Stack(Forward(hidden, tuple(updates), captured), layers_run, row_layers)


def forward_stack(
    model: Model,
    params: Params,
    state: DecodeState,
    proposal: Proposal,
    position: Int[Array, "B C"],
    capture: tuple[int, ...],
    active: Active,
) -> TargetForward:
    """Runs the nodes of a proposal through the layers that are `active`; the rest as in `LayerPolicy.forward`.

    Raises ValueError where the drafter ran some layers.
    """
    if isinstance(proposal, LayerProposal) and proposal.has_run_layers:
        raise ValueError(
            "a layer policy that skips layers needs a drafter that runs none of the target's own, "
            "got a proposal with cache updates of layers: use another drafter, or AllLayers"
        )
    mask = proposal.tree.mask()
    out = run_stack(model, params, proposal.inputs, position, state.caches, active, mask=mask, capture=capture)
    return TargetForward(out.forward, out.layers_run, out.row_layers, state.layer_policy)


def prefill_stack(
    model: Model, params: Params, state: DecodeState, start: Int[Array, ""] | int, chunk: int, active: Active
) -> DecodeState:
    """The state after prefilling prompt tokens start .. start + chunk - 1 through the layers that are `active`."""
    last = model.config.num_layers - 1

    def run(caches, tokens, position, row_length):
        out = run_stack(model, params, tokens, position, caches, active, row_length=row_length, capture=(last,)).forward
        return out.cache_updates, out.captured[last]

    return prefill_state(run, state, start, chunk)
