"""All layers in order, each run always, never, or for those tokens that want it: decoding and reading prompts alike."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decodax.decoding.depth._contract import Reached
from decodax.decoding.depth._layers import mark, run_layer
from decodax.decoding.drafters._contract import Proposal
from decodax.decoding.state import DecodeState, read_prompt_by
from decodax.layers import pytree
from decodax.layers.attention.mask import Mask
from decodax.models.model import Model, Params
from decodax.models.transformer import Forward

# Who runs a layer, given its index and its input: all, nobody (without a look at the caches), or the tokens marked.
Active = Callable[[int, Float[Array, "B T D"]], "bool | Bool[Array, '#B #T']"]


@pytree.dataclass
class Stack:
    """What a run over the layers gave, how many ran, and how many each row asked for."""

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
    """Runs T new tokens per row through the layers that `active` names; a token passes by the others unchanged.

    Every layer gives rows, so that all caches stay in step; those of tokens that did not run it hold no meaning, and
    change nothing in a cache that knows of such tokens (a recurrent state always does).
    """
    hidden = model.embed(params, inputs) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs
    nothing = model.empty_rows(position.shape[0], position.shape[1], hidden.dtype)
    rows, captured = [], {0: hidden} if 0 in capture else {}
    layers_run, row_layers = jnp.int32(0), jnp.zeros(position.shape[0], jnp.int32)
    for index in range(model.config.num_layers):
        wanted = active(index, hidden)
        if wanted is False:
            rows.append(mark(caches[index], nothing[index], jnp.zeros(position.shape, bool)))
        elif wanted is True:
            layers = (index, index + 1)
            out = model.apply(params, hidden, position, caches, mask=mask, layers=layers, row_length=row_length)
            hidden = out.hidden
            rows += out.rows
            layers_run, row_layers = layers_run + 1, row_layers + 1
        else:
            hidden, new, ran = run_layer(
                model, params, index, hidden, position, caches, mask, wanted, row_length=row_length
            )
            rows.append(mark(caches[index], new, jnp.broadcast_to(wanted, position.shape)))
            layers_run = layers_run + ran.astype(jnp.int32)
            row_layers = row_layers + jnp.any(wanted, axis=1).astype(jnp.int32)
        if index + 1 in capture:
            captured[index + 1] = hidden
    return Stack(Forward(hidden, tuple(rows), captured), layers_run, row_layers)


def forward_stack(
    model: Model,
    params: Params,
    state: DecodeState,
    proposal: Proposal,
    position: Int[Array, "B C"],
    capture: tuple[int, ...],
    active: Active,
) -> Reached:
    """The nodes of a proposal through the layers that `active` names; raises ValueError where the drafter ran some."""
    if proposal.rows or proposal.first_layer is not None:
        raise ValueError(
            "a depth that leaves out layers needs a drafter that runs none of the target's own, "
            "got a proposal with rows of layers: use another drafter, or FullDepth"
        )
    inputs = proposal.token if proposal.vectors is None else proposal.vectors
    mask = proposal.tree.mask()
    out = run_stack(model, params, inputs, position, state.caches, active, mask=mask, capture=capture)
    return Reached(out.forward, out.layers_run, out.row_layers, state.depth)


def read_prompt_stack(
    model: Model, params: Params, state: DecodeState, start: Int[Array, ""], chunk: int, active: Active
) -> DecodeState:
    """The state after a chunk of every prompt, run through the layers that `active` names and committed."""
    last = model.config.num_layers - 1

    def run(caches, tokens, position, row_length):
        out = run_stack(model, params, tokens, position, caches, active, row_length=row_length, capture=(last,)).forward
        return out.rows, out.captured[last]

    return read_prompt_by(run, state, start, chunk)
