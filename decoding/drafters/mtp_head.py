"""Drafts with the checkpoint's multi-token prediction (MTP) head, from a hidden state and the token after it.

DeepSeek-V3 Technical Report, arXiv 2412.19437, section 2.2. `models/mtp_head.py` is the head: one layer with a cache of
its own, with an entry for every token but the last: entry i takes the hidden state of token i and the embedding of
token i + 1.

A round's forward of the target gives the true hidden states of the accepted tokens. The head runs on those first, and
only that enters its cache, so the first draft token comes from true states alone. Longer drafts (`num_tokens` above 1)
run the same head again, with its own output in place of the hidden state; those cache updates are staged, and dropped
with the draft. The paper trains one head per further token and its models have one, which was not trained for a second
draft token.

The first round of a row whose prompt is one token drafts nothing: the head has not run yet.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.core import pytree
from decodax.core.weight import Weight
from decodax.decoding.chunked_prefill import prefill_caches
from decodax.decoding.drafters._expand import empty_logprobs, with_drawn_children
from decodax.decoding.drafters._size import set_chain
from decodax.decoding.drafters._staged_draft import Layout, Level, StagedDraft, draft_levels
from decodax.decoding.drafters.contract import Children, Drafter, Outcome, Proposal, fixed_proposal
from decodax.decoding.sampling import processed_logits
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.models.model import Model, Params, commit
from decodax.models.mtp_head import mtp_head


@pytree.dataclass
class Latest:
    """The head's output at the last committed token of each row; kept and committed like a cache."""

    output: Float[Array, "B D"]

    def commit(
        self, updates: Float[Array, "B T D"], count: Int[Array, " B"], path: Int[Array, "B A"] | None = None
    ) -> "Latest":
        """The output at the `count[b]`-th of these tokens; `path`: the nodes of a tree that they are."""
        last = jnp.maximum(count - 1, 0)[:, None]
        last = last if path is None else jnp.take_along_axis(path, last, axis=1)
        new = jnp.take_along_axis(updates, last[:, :, None], axis=1)[:, 0]
        return Latest(jnp.where(count[:, None] > 0, new, self.output))


@dataclass(frozen=True)
class MTPHead(Drafter):
    """A chain of draft tokens from the MTP head of the target's checkpoint.

    `draft_params` are the head's weights (`load_mtp_head`). Its state is (the head's cache, its latest output). After
    NaN or infinity the head no longer runs in that row, which drafts nothing more. Each round takes `num_tokens`
    forwards of the head, the one on true hidden states included; they do not count as layers of the target.

    model: the target.
    num_tokens: of a draft.
    children: INDEPENDENT, drawn from the head's distribution, with the sampling options (in greedy rows the most
        probable); or CHOSEN, always the most probable.
    """

    model: Model
    num_tokens: int = 1
    children: Children = Children.INDEPENDENT
    num_nodes: int = field(init=False)
    max_depth: int = field(init=False)

    auxiliary_weights = "the multi-token prediction head in the model's own checkpoint, which DeepSeek-V3 has"

    def __post_init__(self) -> None:
        set_chain(self, self.num_tokens)

    def check(self, model: Model, draft_params: Any) -> None:
        if model != self.model:
            raise ValueError("an MTP head drafts for the model whose checkpoint holds it: make the drafter with that")
        expected = jax.tree.map(_shape, mtp_head(model).weights())
        found = jax.tree.map(_shape, draft_params)
        if expected != found:
            raise ValueError(
                f"draft_params must be the weights of this model's MTP head, {expected}, got {found}: `load_mtp_head` "
                "reads them from the model's folder"
            )

    def start(self, params: Params, draft_params: Params, state: DecodeState) -> tuple[Any, Latest]:
        """The head's cache and output after the prompts; the target runs over them again, for their hidden states.

        For that it has empty caches, as its own hold the whole prompts already.
        """

        def run(caches, tokens, position, row_length):
            *before, own, _ = caches
            out = self.model.apply(params, tokens, position, tuple(before), row_length=row_length)
            output, updates = self._run_on_states(params, draft_params, state, out.hidden, position, own, row_length)
            return (*out.cache_updates, updates, output), output

        batch, capacity = state.tokens.shape
        dtype = draft_params["join"].dtype
        if dtype != self.model.dtype(params):
            raise ValueError(
                f"the MTP head's weights must have the model's dtype {self.model.dtype(params)}, got {dtype}: "
                "`load_mtp_head(..., dtype=)` reads them in it"
            )
        own = mtp_head(self.model).empty_cache(batch, capacity, dtype)
        latest = Latest(jnp.zeros((batch, self.model.config.hidden_size), dtype))
        empty = tuple(cache.empty_like() for cache in state.caches)
        caches = prefill_caches(run, (*empty, own, latest), state.tokens, state.length, skip=state.failed)
        return caches[-2], caches[-1]

    def propose(self, params: Params, draft_params: Params, state: DecodeState) -> tuple[Proposal, tuple[Any, Latest]]:
        (cache, latest), head, nodes = state.draft, mtp_head(self.model), self.num_nodes
        chain, is_complete = Tree.chain(nodes), (cache.length == state.length - 1) & (state.length > 1)
        kind = self.children if state.sampling.do_sample else Children.CHOSEN

        def run(draft: StagedDraft, level: Level) -> tuple[Float[Array, "B D"], tuple[Any, ...]]:
            """Runs the head on a draft token and its own output before it."""
            embedded, (own,) = (
                self.model.embed(params, level.token, level.position),
                level.stage((cache,), draft.updates),
            )
            before, _ = draft.own
            output, update = head.apply(draft_params, embedded, before[:, None], level.position, own, mask=level.mask)
            return output[:, 0], (update,)

        def expand(draft: StagedDraft, level: Level | None, output: Float[Array, "B D"]) -> StagedDraft:
            """Adds the token after the level's node."""
            _, history = draft.own
            logits = self.model.read_out(params, output[:, None])[:, 0]
            logits = processed_logits(state.sampling, logits, history)[:, None]
            node = draft.level[None]
            position = state.length[:, None] + draft.level
            draft = with_drawn_children(draft, state, kind, logits, node, node[:, None] + 1, position)
            token = jax.lax.dynamic_index_in_dim(draft.token, draft.level + 1, 1)
            history = history.record(token, jnp.ones_like(token[:, 0]))
            return dataclasses.replace(draft, own=(output, history))

        updates = head.empty_update(state.tokens.shape[0], nodes, latest.output.dtype)
        logprobs = empty_logprobs(state, self.children, nodes, self.model.config.vocab_size)
        draft = StagedDraft.begin(state, nodes, (updates,), logprobs=logprobs, own=(latest.output, state.history))
        draft = dataclasses.replace(expand(draft, None, latest.output), level=jnp.int32(1))
        # The cache holds the entry of the token before the last one; node i adds the one of the token before it.
        layout = Layout.chain(state.length - 1, nodes, first=1)
        draft = draft_levels(draft, layout, run, expand, self.num_tokens)
        forwards = self.num_tokens
        is_candidate = draft.is_candidate & is_complete[:, None]
        proposal = fixed_proposal(chain, draft.token, is_candidate, logprobs=draft.logprobs, forwards=forwards)
        return proposal, state.draft

    def update(self, params: Params, draft_params: Params, state: DecodeState, outcome: Outcome) -> tuple[Any, Latest]:
        """Runs the head on what the round added: the true hidden states of the tokens, each with the token after it."""
        cache, latest = state.draft
        emitted = outcome.num_emitted
        offset = jnp.arange(self.num_nodes, dtype=jnp.int32)[None, :]
        is_new = offset < emitted[:, None]
        position = (state.length - emitted)[:, None] - 1 + offset
        hidden = outcome.forward.hidden
        output, updates = self._run_on_states(params, draft_params, state, hidden, position, cache, position + 1)
        # The count depends on the forward, so XLA writes the cache in place (see KVCache.commit).
        is_finite = jnp.all(jnp.isfinite(output) | ~is_new[:, :, None], axis=(1, 2))
        is_complete = cache.length == state.length - emitted - 1
        count = jnp.where(is_finite & is_complete, emitted, 0)
        cache, latest = commit((cache, latest), (updates, output), count)
        return cache, latest

    def _run_on_states(
        self,
        params: Params,
        draft_params: Params,
        state: DecodeState,
        hidden: Float[Array, "B T D"],
        position: Int[Array, "B T"],
        cache: Any,
        row_length: Int[Array, "B #T"],
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The head's outputs and cache updates where the target's hidden states and the tokens after them are known.

        hidden, position: the target's hidden states, and their tokens' positions.
        cache: the head's.
        row_length: tokens that each row will have.
        """
        after = jnp.minimum(position + 1, state.tokens.shape[1] - 1)
        embedded = self.model.embed(params, jnp.take_along_axis(state.tokens, after, axis=1), after)
        normed = self.model.normed(params, hidden)
        return mtp_head(self.model).apply(draft_params, embedded, normed, position, cache, row_length=row_length)


def _shape(weight: Weight | Array) -> tuple[int, ...]:
    return tuple(weight.shape)
