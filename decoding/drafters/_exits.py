"""Drafts a chain after the target's first layers, token by token, until a rule ends it.

What self-speculative drafters share: they differ in what reads the hidden states after the exit layer, and in the rule.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.core import pytree
from decodax.decoding.drafters._staged_draft import Layout, Level, StagedDraft, draft_levels
from decodax.decoding.drafters.contract import fixed_proposal
from decodax.decoding.drafters.wider_proposals import LayerProposal
from decodax.decoding.logits_processors import History
from decodax.decoding.sampling import argmax_and_confidence
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.models.model import Model


@pytree.dataclass
class AtExit:
    """What a chain carries beside its tokens and cache updates.

    hidden: after the exit layer, at the nodes run.
    history: as if the tokens had been emitted.
    goes_on: active rows that draft a token after the next node, rather than only verify that node.
    num_runs: nodes run so far that the row needed.
    own: what a drafter carries besides.
    """

    hidden: Float[Array, "B C D"]
    history: History
    goes_on: Bool[Array, " B"]
    num_runs: Int[Array, " B"]
    own: Any = ()


# Runs a level: hidden states after the exit layer, what the head reads, the drafter's own, and the cache updates.
Run = Callable[[StagedDraft, Level], tuple[Float[Array, "B 1 D"], Any, Any, tuple[Any, ...]]]
# From each row's confidence in its new token: whether it may be accepted, and whether the row drafts another.
Rule = Callable[[Float32[Array, " B"]], tuple[Bool[Array, "#B"], Bool[Array, "#B"]]]


def draft_chain(
    model: Model,
    params: Any,
    state: DecodeState,
    updates: tuple[Any, ...],
    run: Run,
    head: Callable[[Any], Float32[Array, "B 1 V"]],
    rule: Rule,
    *,
    num_nodes: int,
    limit: Int[Array, ""] | int | None = None,
    own: Any = (),
) -> StagedDraft:
    """A draft of the most probable tokens after the exit; its `own` is `AtExit`.

    The head does not run where no row drafts a token: after the last node, and after the token that ends every row.

    updates: empty cache updates for `num_nodes` nodes.
    run, head: the layers up to the exit, and the logits of what they give.
    rule: ends a row's draft.
    limit: nodes that this draft may have; all by default.
    own: what the drafter carries besides, for `run`.
    """
    batch, limit = state.tokens.shape[0], num_nodes if limit is None else limit
    hidden = jnp.zeros((batch, num_nodes, model.config.hidden_size), model.dtype(params))
    carried = AtExit(hidden, state.history, ~state.done, jnp.zeros(batch, jnp.int32), own)

    def run_node(draft: StagedDraft, level: Level) -> tuple[Any, tuple[Any, ...]]:
        hidden, read, own, updates = run(draft, level)
        return (hidden, read, own), updates

    def expand(draft: StagedDraft, level: Level, output: Any) -> StagedDraft:
        (hidden, read, own), before, after = output, draft.own, draft.level + 1
        drafts = before.goes_on & (after < limit)

        def predict() -> tuple[Int[Array, " B"], Float32[Array, " B"]]:
            return argmax_and_confidence(state.sampling, head(read)[:, 0], before.history)

        def skip() -> tuple[Int[Array, " B"], Float32[Array, " B"]]:
            return jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.float32)

        token, confidence = jax.lax.cond(jnp.any(drafts), predict, skip)
        is_candidate, goes_on = rule(confidence)
        carried = AtExit(
            hidden=jax.lax.dynamic_update_slice_in_dim(before.hidden, hidden, draft.level, axis=1),
            history=before.history.record(token[:, None], drafts.astype(jnp.int32)),
            goes_on=drafts & goes_on,
            num_runs=before.num_runs + draft.active.astype(jnp.int32),
            own=own,
        )
        draft = draft.with_children(after, token, drafts & is_candidate)
        return dataclasses.replace(draft, active=drafts & is_candidate, own=carried)

    begun = StagedDraft.begin(state, num_nodes, updates, own=carried)
    return draft_levels(begun, Layout.chain(state.length, num_nodes), run_node, expand, limit)


def chain_proposal(
    draft: StagedDraft, exit_layer: Int[Array, ""] | int, cache_updates: tuple[Any, ...]
) -> LayerProposal:
    """The proposal of a chain by `draft_chain`.

    exit_layer: number of layers that drafted; an array where only the round decides it.
    cache_updates: those of the target's layers.
    """
    forwards, carried = draft.level, draft.own
    chain = fixed_proposal(Tree.chain(draft.token.shape[1]), draft.token, draft.is_candidate, forwards=forwards)
    return LayerProposal.extend(
        chain,
        carried.hidden,
        cache_updates=cache_updates,
        first_layer=None if isinstance(exit_layer, int) else exit_layer,
        layers_run=exit_layer * forwards,
        row_layers=exit_layer * carried.num_runs,
    )


def check_exit(model: Model, exit_layer: int) -> None:
    """Raises ValueError for an exit that is not between the first layer and the last."""
    last = model.config.num_layers - 1
    if last < 1:
        raise ValueError("an early exit needs a model of at least 2 layers, got 1")
    if not 1 <= exit_layer <= last:
        raise ValueError(f"exit_layer must be in 1..{last} (layers that draft, of {last + 1}), got {exit_layer}")


def check_draft(own: Model, target: Model, draft_params: Any) -> None:
    """Raises ValueError when the model whose layers draft is not the one that verifies, or has other weights."""
    if own != target:
        raise ValueError(
            "the layers that draft must be the target's own: make the drafter with the model it drafts for"
        )
    if draft_params is not None:
        raise ValueError("early layers draft with the target's own weights: leave draft_params out (None)")
