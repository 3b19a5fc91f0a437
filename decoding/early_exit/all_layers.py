"""Runs every layer, except those that a drafter made of the target's own first layers has run already."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from decodax.decoding.drafters.wider_proposals import LayerProposal
from decodax.decoding.early_exit.conditional_layer import run_layer
from decodax.decoding.early_exit.contract import LayerPolicy, TargetForward
from decodax.decoding.state import DecodeState
from decodax.models.model import Model, Params
from decodax.models.transformer import Forward


@dataclass(frozen=True)
class AllLayers(LayerPolicy):
    """All layers for all tokens: the unchanged model."""

    lossless = True

    def forward(self, model, params, state, proposal, position, capture):
        num_layers, mask = model.config.num_layers, proposal.tree.mask()
        if not isinstance(proposal, LayerProposal):
            out = model.apply(params, proposal.token, position, state.caches, mask=mask, capture=capture)
            return _counted(out, num_layers, num_layers, position, state)
        if proposal.first_layer is None:
            first = len(proposal.cache_updates)
            layers = (first, num_layers)
            out = model.apply(
                params, proposal.hidden, position, state.caches, mask=mask, layers=layers, capture=capture
            )
            out = out._replace(cache_updates=(*proposal.cache_updates, *out.cache_updates))
        else:
            first = jnp.asarray(proposal.first_layer, jnp.int32)
            out = _run_from(model, params, state, proposal, first, position, capture)
        left = num_layers - first
        return _counted(out, proposal.layers_run + left, proposal.row_layers + left, position, state)


def _run_from(
    model: Model,
    params: Params,
    state: DecodeState,
    proposal: LayerProposal,
    first: Int[Array, ""],
    position: Int[Array, "B C"],
    capture: tuple[int, ...],
) -> Forward:
    """Runs the layers from `first` on, which only the round decides."""
    hidden, mask = proposal.hidden, proposal.tree.mask()
    updates, captured = [], {}
    for index, update in enumerate(proposal.cache_updates):
        is_left = index >= first
        hidden, new, _ = run_layer(
            model, params, index, hidden, position, state.caches, mask, is_left, otherwise=update
        )
        updates.append(new)
        if index + 1 in capture:
            captured[index + 1] = hidden
    return Forward(hidden, tuple(updates), captured)


def _counted(out: Forward, layers_run: Any, row_layers: Any, position: Array, state: DecodeState) -> TargetForward:
    per_row = jnp.broadcast_to(jnp.asarray(row_layers, jnp.int32), position.shape[:1])
    return TargetForward(out, jnp.asarray(layers_run, jnp.int32), per_row, state.layer_policy)
