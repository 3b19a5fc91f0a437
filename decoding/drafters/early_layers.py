"""Drafts with the target's first layers and its head; the other layers verify (self-speculative decoding).

LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding, arXiv 2404.16710. Works with models that were
taught to exit early (`decodax train layer_skip`, or published LayerSkip checkpoints).

Draft and verification share the cache, and nothing runs twice: verification gets the hidden states after the first
layers and their cache updates for every node, and begins at the layer where the draft ended. So the last token of a
draft runs the first layers too, though nothing is drafted from it. Departs from the paper in that a draft always has
its full length; the paper's code ends one early at the end of a text.
"""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from decodax.decoding.drafters._exits import chain_proposal, check_draft, check_exit, draft_chain
from decodax.decoding.drafters._size import set_chain
from decodax.decoding.drafters._staged_draft import Level, StagedDraft
from decodax.decoding.drafters.contract import Drafter, Proposal
from decodax.decoding.state import DecodeState
from decodax.models.model import Model


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
        batch, exit_layer = state.tokens.shape[0], self.exit_layer
        shallow, deep = state.caches[:exit_layer], state.caches[exit_layer:]

        def run(draft: StagedDraft, level: Level):
            caches = (*level.stage(shallow, draft.updates), *deep)
            layers = (0, exit_layer)
            out = self.model.apply(params, level.token, level.position, caches, mask=level.mask, layers=layers)
            return out.hidden, out.hidden, (), out.cache_updates

        draft = draft_chain(
            self.model,
            params,
            state,
            self.model.empty_update(batch, self.num_nodes, self.model.dtype(params))[:exit_layer],
            run,
            head=lambda hidden: self.model.logits(params, hidden),
            rule=lambda confidence: (jnp.ones_like(confidence, bool), jnp.ones_like(confidence, bool)),
            num_nodes=self.num_nodes,
        )
        return chain_proposal(draft, exit_layer, draft.updates), state.draft
