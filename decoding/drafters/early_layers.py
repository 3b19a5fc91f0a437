"""Drafts with the target's first layers and its head; the other layers verify (self-speculative decoding).

LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding, arXiv 2404.16710. Works with models that were
taught to exit early (`decodax train layer_skip`, or published LayerSkip checkpoints).

Draft and verification share the cache, and nothing runs twice: verification gets the hidden states after the first
layers and their cache updates for every node, and begins at the layer where the draft ended. So the last token of a
draft runs the first layers too, though nothing is drafted from it. Departs from the paper in that a draft always has
its full length; the paper's code ends one early at the end of a text.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.decoding.drafters._exits import argmax_and_confidence, check_draft, check_exit, staged_before
from decodax.decoding.drafters._size import set_chain
from decodax.decoding.drafters.contract import Drafter, Proposal, fixed_proposal
from decodax.decoding.logits_processors import History
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.layers.kv_cache.staged import place, stage
from decodax.models.model import Model


class _Draft(NamedTuple):
    """A draft in progress.

    token: draft tokens so far.
    history: as if the tokens had been emitted.
    vectors: hidden states after the first layers, at the nodes run.
    cache_updates: of the first layers.
    """

    token: Int[Array, "B C"]
    history: History
    vectors: Float[Array, "B C D"]
    cache_updates: tuple[Any, ...]


@dataclass(frozen=True)
class EarlyLayers(Drafter):
    """A chain of the most probable tokens after the target's first layers.

    model: the target.
    exit_layer: number of layers that draft.
    max_tokens: of a draft.
    """

    model: Model
    exit_layer: int
    max_tokens: int
    num_nodes: int = field(init=False)
    max_depth: int = field(init=False)

    auxiliary_weights = "a model taught to exit early: `decodax train layer_skip`, or a LayerSkip checkpoint"

    def __post_init__(self) -> None:
        check_exit(self.model, self.exit_layer)
        set_chain(self, self.max_tokens)

    def check(self, model: Model, draft_params: Any) -> None:
        check_draft(self.model, model, draft_params)

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, Any]:
        tree, last_token, exit_layer = Tree.chain(self.num_nodes), state.last_token(), self.exit_layer
        position = state.length[:, None] - 1 + jnp.asarray(tree.depth)
        dtype, batch = self.model.dtype(params), last_token.shape[0]
        draft = _Draft(
            jnp.zeros(position.shape, jnp.int32).at[:, 0].set(last_token),
            state.history,
            jnp.zeros((*position.shape, self.model.config.hidden_size), dtype),
            self.model.empty_update(batch, self.num_nodes, dtype)[:exit_layer],
        )

        def run(node: Int[Array, ""], draft: _Draft) -> _Draft:
            staged = (*stage(state.caches[:exit_layer], draft.cache_updates, position), *state.caches[exit_layer:])
            out = self.model.apply(
                params,
                jax.lax.dynamic_slice_in_dim(draft.token, node, 1, axis=1),
                jax.lax.dynamic_slice_in_dim(position, node, 1, axis=1),
                staged,
                mask=staged_before(node, self.num_nodes),
                layers=(0, exit_layer),
            )
            vectors = jax.lax.dynamic_update_slice_in_dim(draft.vectors, out.hidden, node, axis=1)
            draft = draft._replace(
                vectors=vectors, cache_updates=place(draft.cache_updates, out.cache_updates, node[None])
            )

            def draft_token() -> Int[Array, " B"]:
                logits = self.model.logits(params, out.hidden)[:, 0]
                return argmax_and_confidence(state.sampling, logits, draft.history)[0]

            # Nothing is drafted from the last node, so the head does not run there.
            drafted = jax.lax.cond(node < self.max_tokens, draft_token, lambda: last_token)
            token = draft.token.at[:, node + 1].set(drafted, mode="drop")
            history = draft.history.record(drafted[:, None], jnp.ones_like(last_token))
            return draft._replace(token=token, history=history)

        draft = jax.lax.fori_loop(0, self.num_nodes, run, draft)
        proposal = fixed_proposal(tree, draft.token, jnp.ones(position.shape, bool), forwards=self.num_nodes)
        layers_run = self.num_nodes * exit_layer
        of_draft = {"vectors": draft.vectors, "cache_updates": draft.cache_updates, "layers_run": layers_run}
        return dataclasses.replace(proposal, **of_draft), state.draft
