"""Checks the wider proposals of a drafter of one's own (`drafters/wider_proposals.py`) while the loop is traced."""

from typing import Any

import jax
import jax.numpy as jnp

from decodax.core.arguments import shown
from decodax.core.array_check import check_array
from decodax.decoding.drafters.contract import Proposal
from decodax.decoding.drafters.wider_proposals import HintedProposal, LayerProposal
from decodax.models.model import Model


def check_wider(name: str, proposal: Proposal, shape: tuple[int, int], model: Model) -> None:
    """Raises ValueError, with the field, what it must be and what it is, for what breaks the contract.

    name: of the function that made the proposal.
    shape: rows and nodes.
    model: the target.
    """
    if isinstance(proposal, HintedProposal):
        check_array(f"likely of {name}", proposal.likely, (*shape, None), jnp.integer, "rows, num_nodes, tokens")
    if not isinstance(proposal, LayerProposal):
        return
    hidden = (*shape, model.config.hidden_size)
    check_array(f"hidden of {name}", proposal.hidden, hidden, jnp.floating, "rows, num_nodes, hidden size")
    check_array(f"layers_run of {name}", proposal.layers_run, (), jnp.integer)
    if jnp.shape(proposal.row_layers):
        check_array(f"row_layers of {name}", proposal.row_layers, shape[:1], jnp.integer, "rows")
    if proposal.first_layer is not None:
        check_array(f"first_layer of {name}", proposal.first_layer, (), jnp.integer)
    _check_updates(name, proposal, shape, model)


def _check_updates(name: str, proposal: LayerProposal, shape: tuple[int, int], model: Model) -> None:
    layers, updates = model.config.num_layers, proposal.cache_updates
    if not isinstance(updates, tuple):
        raise ValueError(f"cache_updates of {name} must be a tuple, one entry for each layer run, got {shown(updates)}")
    if len(updates) > layers or (proposal.first_layer is not None and len(updates) != layers):
        number = f"at most {layers}" if proposal.first_layer is None else f"{layers}, as first_layer is given"
        raise ValueError(f"cache_updates of {name} must be one for each layer run, {number}, got {len(updates)}")
    wanted = jax.eval_shape(lambda: model.empty_update(*shape, jnp.float32)[: len(updates)])
    for index, (one, other) in enumerate(zip(wanted, updates, strict=True)):
        if _described(one) != _described(other):
            raise ValueError(
                f"cache_updates[{index}] of {name} must be that layer's for {shape[0]} rows of {shape[1]} nodes, "
                f"{_described(one)}, got {_described(other)}"
            )


def _described(update: Any) -> str:
    """The kind of a cache update, and the shapes of its arrays."""
    return f"{type(update).__name__} with {', '.join(str(list(leaf.shape)) for leaf in jax.tree.leaves(update))}"
