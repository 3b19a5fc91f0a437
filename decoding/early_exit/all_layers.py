"""Runs every layer, except those that a drafter made of the target's own first layers has run already."""

from dataclasses import dataclass

import jax.numpy as jnp

from decodax.decoding.early_exit.conditional_layer import run_layer
from decodax.decoding.early_exit.contract import LayerPolicy, TargetForward
from decodax.models.transformer import Forward


@dataclass(frozen=True)
class AllLayers(LayerPolicy):
    """All layers for all tokens: the unchanged model."""

    lossless = True

    def forward(self, model, params, state, proposal, position, capture):
        inputs = proposal.token if proposal.vectors is None else proposal.vectors
        num_layers, mask = model.config.num_layers, proposal.tree.mask()
        if proposal.first_layer is None:
            first = len(proposal.cache_updates)
            layers = (first, num_layers)
            out = model.apply(params, inputs, position, state.caches, mask=mask, layers=layers, capture=capture)
            out = out._replace(cache_updates=(*proposal.cache_updates, *out.cache_updates))
            layers_run = jnp.int32(num_layers - first)
        else:
            hidden, updates, captured = inputs, [], {}
            for index in range(num_layers):
                is_left = index >= proposal.first_layer
                hidden, new, _ = run_layer(
                    model,
                    params,
                    index,
                    hidden,
                    position,
                    state.caches,
                    mask,
                    is_left,
                    otherwise=proposal.cache_updates[index],
                )
                updates.append(new)
                if index + 1 in capture:
                    captured[index + 1] = hidden
            out = Forward(hidden, tuple(updates), captured)
            layers_run = num_layers - proposal.first_layer
        return TargetForward(out, layers_run, jnp.broadcast_to(layers_run, position.shape[:1]), state.layer_policy)
