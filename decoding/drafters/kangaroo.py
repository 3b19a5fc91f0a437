"""Drafts with the target's first layers, a small adapter and the target's head; the other layers verify (Kangaroo).

Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting, arXiv 2404.18911. The first exit leaves the
target after a few layers. The second ends a draft early: when the adapter's confidence in a token is below a threshold,
no further one is drafted; that token is still verified. Verification gets the hidden states and cache updates of the
first layers, and runs only the layers after them.

Departs from the paper in that rows of a batch draft together, for as many steps as the longest draft takes, and each
row verifies its own draft; and sampled rows draft the adapter's most probable token after the sampling options, where
verification by exact match keeps the target distribution. The confidence is always that of the adapter's distribution
before any option, so that it means the same in greedy and in sampled rows.
"""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from decodax.decoding.chunked_prefill import prefill_caches
from decodax.decoding.drafters._exits import chain_proposal, check_exit, draft_chain
from decodax.decoding.drafters._size import set_chain
from decodax.decoding.drafters._staged_draft import Level, StagedDraft
from decodax.decoding.drafters.contract import Drafter, Outcome, Proposal
from decodax.decoding.state import DecodeState
from decodax.layers.adapters.attention_exit import AttentionExit
from decodax.models.model import Model


def exit_adapter(model: Model, exit_layer: int) -> AttentionExit:
    """The adapter after the first `exit_layer` layers: attention like that of the next layer, the first left out.

    Raises ValueError for an exit that is not between the first layer and the last.
    """
    check_exit(model, exit_layer)
    config, block = model.config, model.config.blocks[exit_layer]
    norms = [norm for norm in (block.mixer.norm, config.final_norm) if norm is not None]
    if not norms:
        raise ValueError(
            "Kangaroo's adapter has the norms of the model before its attention and its head, and this model has "
            "neither: take another strategy (`decodax methods` lists them)"
        )
    return AttentionExit(
        block.mixer.layer,
        norms[0],
        norms[-1],
        config.hidden_size,
        model.execution,
    )


@dataclass(frozen=True)
class Kangaroo(Drafter):
    """A chain ended by the first token whose probability is below `confidence`.

    Its weights are {"adapter": those of `exit_adapter`}; its state is the adapter's cache, which holds all tokens of a
    row but the last one. A step of drafting runs `exit_layer` layers of the target for one token of each row, which
    count as layers; the adapter's attention, and the head for each draft token, are not layers of the target and are
    not counted. A proposal always has max_tokens + 1 nodes, however few of them are filled.

    model: the target.
    exit_layer: number of layers that draft.
    max_tokens: of a draft.
    confidence: the threshold (eta), in 0..1.
    """

    model: Model
    exit_layer: int
    max_tokens: int = 6
    confidence: float = 0.6
    num_nodes: int = field(init=False)
    max_depth: int = field(init=False)

    auxiliary_weights = "an adapter between the exit layer and the head: `decodax train kangaroo`"

    def __post_init__(self) -> None:
        exit_adapter(self.model, self.exit_layer)
        if not 0 <= self.confidence <= 1:
            raise ValueError(f"the confidence must be a probability in 0..1, got {self.confidence}")
        set_chain(self, self.max_tokens)

    @property
    def adapter(self) -> AttentionExit:
        return exit_adapter(self.model, self.exit_layer)

    def check(self, model: Model, draft_params: Any) -> None:
        if model != self.model:
            raise ValueError("the first layers that draft must be the target's own: make the drafter with its model")
        if not isinstance(draft_params, dict) or "adapter" not in draft_params:
            raise ValueError('a Kangaroo drafter needs {"adapter": weights}: `decodax train kangaroo` makes them')
        self.adapter.check(draft_params["adapter"])

    def start(self, params: Any, draft_params: Any, state: DecodeState) -> Any:
        """The adapter's cache; the first layers run over the prompts once more, for the adapter's input.

        For that they have empty caches, as the target's hold the whole prompts already.
        """
        shallow, deep = state.caches[: self.exit_layer], state.caches[self.exit_layer :]

        def run(caches, tokens, position, row_length):
            *before, own = caches
            layers = (0, self.exit_layer)
            out = self.model.apply(params, tokens, position, (*before, *deep), row_length=row_length, layers=layers)
            normed, updates = self.adapter.apply(
                draft_params["adapter"], out.hidden, position, own, row_length=row_length
            )
            return (*out.cache_updates, updates), normed

        batch, capacity = state.tokens.shape
        own = self.adapter.empty_cache(batch, capacity, self.model.dtype(params))
        empty = tuple(cache.empty_like() for cache in shallow)
        return prefill_caches(run, (*empty, own), state.tokens, state.length, skip=state.failed)[-1]

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, tuple[Any, Any]]:
        batch, dtype, exit_layer = state.tokens.shape[0], self.model.dtype(params), self.exit_layer
        shallow, deep = state.caches[:exit_layer], state.caches[exit_layer:]
        own_update = self.adapter.empty_update(batch, self.num_nodes, dtype)

        def run(draft: StagedDraft, level: Level):
            *staged, own = level.stage((*shallow, state.draft), draft.updates)
            token, position, mask = level.token, level.position, level.mask
            out = self.model.apply(params, token, position, (*staged, *deep), mask=mask, layers=(0, exit_layer))
            normed, update = self.adapter.apply(draft_params["adapter"], out.hidden, position, own, mask=mask)
            return out.hidden, normed, (), (*out.cache_updates, update)

        draft = draft_chain(
            self.model,
            params,
            state,
            (*self.model.empty_update(batch, self.num_nodes, dtype)[:exit_layer], own_update),
            run,
            head=lambda normed: self.model.read_out(params, normed),
            rule=lambda confidence: (jnp.ones_like(confidence, bool), confidence >= self.confidence),
            num_nodes=self.num_nodes,
        )
        *updates, own_update = draft.updates
        return chain_proposal(draft, exit_layer, tuple(updates)), (state.draft, own_update)

    def update(self, params: Any, draft_params: Any, state: DecodeState, outcome: Outcome) -> Any:
        """Every candidate was run, so the updates of all accepted ones and the root are known."""
        cache, updates = state.draft
        return cache.commit(updates, outcome.num_emitted)
