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

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decodax.decoding.chunked_prefill import prefill_caches
from decodax.decoding.drafters._exits import argmax_and_confidence, check_exit, staged_before
from decodax.decoding.drafters._size import set_chain
from decodax.decoding.drafters.contract import Drafter, Outcome, Proposal, fixed_proposal
from decodax.decoding.logits_processors import History
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.layers.adapters.attention_exit import AttentionExit
from decodax.layers.kv_cache.staged import Staged, place, stage
from decodax.models.model import Model, Params


def exit_adapter(model: Model, exit_layer: int) -> AttentionExit:
    """The adapter after the first `exit_layer` layers: attention like that of the next layer, the first left out.

    Raises ValueError for an exit that is not between the first layer and the last.
    """
    check_exit(model, exit_layer)
    config, block = model.config, model.config.blocks[exit_layer]
    return AttentionExit(block.mixer, block.norm, config.final_norm, config.hidden_size, model.execution)


class _Draft(NamedTuple):
    """A draft in progress.

    node: the next one to run.
    token, is_candidate: draft tokens so far, and which may be accepted.
    hidden, cache_updates: of the first layers, at the nodes before `node`.
    adapter_update: the adapter's cache update there.
    history: as if the tokens had been emitted.
    runs: rows that need `node` run, to verify it.
    goes_on: those of them that draft a token after it.
    num_runs: nodes run so far that the row needed.
    """

    node: Int[Array, ""]
    token: Int[Array, "B C"]
    is_candidate: Bool[Array, "B C"]
    hidden: Float[Array, "B C D"]
    cache_updates: tuple[Any, ...]
    adapter_update: Any
    history: History
    runs: Bool[Array, " B"]
    goes_on: Bool[Array, " B"]
    num_runs: Int[Array, " B"]


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
        empty = jax.tree.map(jnp.zeros_like, shallow)  # caches of any kind begin as zeros
        return prefill_caches(run, (*empty, own), state.tokens, state.length, skip=state.failed)[-1]

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, tuple[Any, Any]]:
        def is_unfinished(draft: _Draft) -> Bool[Array, ""]:
            return (draft.node < self.num_nodes) & jnp.any(draft.runs)

        def step(draft: _Draft) -> _Draft:
            draft, normed = self._run(params, draft_params, draft, state)
            return self._draft_token(params, draft, state, normed)

        draft = jax.lax.while_loop(is_unfinished, step, self._begin(params, draft_params, state))
        proposal = fixed_proposal(Tree.chain(self.num_nodes), draft.token, draft.is_candidate, forwards=draft.node)
        proposal = dataclasses.replace(
            proposal,
            vectors=draft.hidden,
            cache_updates=draft.cache_updates,
            layers_run=self.exit_layer * draft.node,
            row_layers=self.exit_layer * draft.num_runs,
        )
        return proposal, (state.draft, draft.adapter_update)

    def update(self, params: Any, draft_params: Any, state: DecodeState, outcome: Outcome) -> Any:
        """Every candidate was run, so the updates of all accepted ones and the root are known."""
        cache, updates = state.draft
        return cache.commit(updates, outcome.num_emitted)

    def _begin(self, params: Params, draft_params: Any, state: DecodeState) -> _Draft:
        batch, nodes = state.tokens.shape[0], self.num_nodes
        dtype = self.model.dtype(params)
        return _Draft(
            node=jnp.int32(0),
            token=jnp.zeros((batch, nodes), jnp.int32).at[:, 0].set(state.last_token()),
            is_candidate=jnp.zeros((batch, nodes), bool),
            hidden=jnp.zeros((batch, nodes, self.model.config.hidden_size), dtype),
            cache_updates=self.model.empty_update(batch, nodes, dtype)[: self.exit_layer],
            adapter_update=self.adapter.empty_update(batch, nodes, dtype),
            history=state.history,
            runs=~state.done,
            goes_on=~state.done,
            num_runs=jnp.zeros(batch, jnp.int32),
        )

    def _run(
        self, params: Params, draft_params: Any, draft: _Draft, state: DecodeState
    ) -> tuple[_Draft, Float[Array, "B 1 D"]]:
        """The draft with its node run through the first layers and the adapter, and the head's input there."""
        node, places = draft.node, jnp.arange(self.num_nodes, dtype=jnp.int32)
        positions = state.length[:, None] - 1 + places[None, :]
        own = state.length[:, None] - 1 + node
        mask = staged_before(node, self.num_nodes)
        token = jax.lax.dynamic_slice_in_dim(draft.token, node, 1, axis=1)
        shallow, deep = state.caches[: self.exit_layer], state.caches[self.exit_layer :]
        caches = (*stage(shallow, draft.cache_updates, positions), *deep)
        out = self.model.apply(params, token, own, caches, mask=mask, layers=(0, self.exit_layer))
        staged = Staged(state.draft, draft.adapter_update, positions)
        normed, adapter_update = self.adapter.apply(draft_params["adapter"], out.hidden, own, staged, mask=mask)
        draft = draft._replace(
            hidden=draft.hidden.at[:, node].set(out.hidden[:, 0]),
            cache_updates=place(draft.cache_updates, out.cache_updates, node[None]),
            adapter_update=draft.adapter_update.place(adapter_update, node[None]),
            num_runs=draft.num_runs + draft.runs.astype(jnp.int32),
        )
        return draft, normed

    def _draft_token(self, params: Params, draft: _Draft, state: DecodeState, normed: Float[Array, "B 1 D"]) -> _Draft:
        """The draft with a token after its node, in the rows that go on; the head runs only if there is one."""
        drafts = draft.goes_on & (draft.node + 1 < self.num_nodes)

        def predict() -> tuple[Int[Array, " B"], Float[Array, " B"]]:
            return argmax_and_confidence(state.sampling, self.model.read_out(params, normed)[:, 0], draft.history)

        def skip() -> tuple[Int[Array, " B"], Float[Array, " B"]]:
            return jnp.zeros(drafts.shape, jnp.int32), jnp.zeros(drafts.shape, jnp.float32)

        token, confidence = jax.lax.cond(jnp.any(drafts), predict, skip)
        after = draft.node + 1
        return draft._replace(
            node=after,
            token=draft.token.at[:, after].set(token, mode="drop"),
            is_candidate=draft.is_candidate.at[:, after].set(drafts, mode="drop"),
            history=draft.history.record(token[:, None], drafts.astype(jnp.int32)),
            runs=drafts,
            goes_on=drafts & (confidence >= self.confidence),
        )
