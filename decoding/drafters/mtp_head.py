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

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.core import pytree
from decodax.core.weight import Weight
from decodax.decoding.chunked_prefill import prefill_caches
from decodax.decoding.drafters._exits import staged_before
from decodax.decoding.drafters._expand import draw_children
from decodax.decoding.drafters._size import set_chain
from decodax.decoding.drafters.contract import Children, Drafter, Outcome, Proposal, fixed_proposal
from decodax.decoding.logits_processors import History
from decodax.decoding.sampling import processed_logits
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.layers.kv_cache.staged import Staged
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


class _Draft(NamedTuple):
    """A draft in progress.

    token, is_candidate: draft tokens so far, and which may be accepted.
    logprobs: from which they were drawn.
    output: of the head at the last node but one, which predicts the last.
    cache_updates: the head's, staged.
    history: as if the tokens had been emitted.
    """

    token: Int[Array, "B C"]
    is_candidate: Bool[Array, "B C"]
    logprobs: Float32[Array, "B C V"] | None
    output: Float[Array, "B D"]
    cache_updates: Any
    history: History


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
        own = mtp_head(self.model).empty_cache(batch, capacity, dtype)
        latest = Latest(jnp.zeros((batch, self.model.config.hidden_size), dtype))
        empty = jax.tree.map(jnp.zeros_like, state.caches)  # caches of any kind begin as zeros
        caches = prefill_caches(run, (*empty, own, latest), state.tokens, state.length, skip=state.failed)
        return caches[-2], caches[-1]

    def propose(self, params: Params, draft_params: Params, state: DecodeState) -> tuple[Proposal, tuple[Any, Latest]]:
        draft = self._draft_token(params, state, self._begin(state), 0)
        offset = jnp.arange(self.num_nodes, dtype=jnp.int32)
        position = state.length[:, None] - 1 + offset[None, :]

        def step(node: Int[Array, ""], draft: _Draft) -> _Draft:
            """Runs the head at the node before `node`, then drafts the token after `node`."""
            embedded = self.model.embed(params, jax.lax.dynamic_slice_in_dim(draft.token, node, 1, axis=1))
            own, slot = jax.lax.dynamic_slice_in_dim(position, node - 1, 1, axis=1), node - 1
            staged, mask = Staged(state.draft[0], draft.cache_updates, position), staged_before(slot, self.num_nodes)
            head, before = mtp_head(self.model), draft.output[:, None]
            output, updates = head.apply(draft_params, embedded, before, own, staged, mask=mask)
            draft = draft._replace(output=output[:, 0], cache_updates=draft.cache_updates.place(updates, slot[None]))
            return self._draft_token(params, state, draft, node)

        draft = jax.lax.fori_loop(1, self.num_tokens, step, draft)
        chain, forwards = Tree.chain(self.num_nodes), self.num_tokens
        return fixed_proposal(
            chain, draft.token, draft.is_candidate, logprobs=draft.logprobs, forwards=forwards
        ), state.draft

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
        embedded = self.model.embed(params, jnp.take_along_axis(state.tokens, after, axis=1))
        normed = self.model.normed(params, hidden)
        return mtp_head(self.model).apply(draft_params, embedded, normed, position, cache, row_length=row_length)

    def _begin(self, state: DecodeState) -> _Draft:
        batch, vocab_size = state.tokens.shape[0], self.model.config.vocab_size
        shape, output = (batch, self.num_nodes), state.draft[1].output
        logprobs = None
        if state.sampling.do_sample and self.children is not Children.CHOSEN:
            logprobs = jnp.zeros((*shape, vocab_size), jnp.float32)
        updates = mtp_head(self.model).empty_update(batch, self.num_nodes, output.dtype)
        token = jnp.zeros(shape, jnp.int32).at[:, 0].set(state.last_token())
        return _Draft(token, jnp.zeros(shape, bool), logprobs, output, updates, state.history)

    def _draft_token(self, params: Params, state: DecodeState, draft: _Draft, node: Int[Array, ""] | int) -> _Draft:
        """The draft with a token after `node`, from the head's output."""
        logits = self.model.read_out(params, draft.output[:, None])[:, 0]
        logits = processed_logits(state.sampling, logits, draft.history)
        kind = self.children if state.sampling.do_sample else Children.CHOSEN
        children, possible = draw_children(logits[:, None], kind, 1, state.seed, state.length[:, None] + node)
        token, logprobs = children[:, 0, 0], draft.logprobs
        is_complete = (state.draft[0].length == state.length - 1) & (state.length > 1)
        if logprobs is not None:
            logprobs = logprobs.at[:, node].set(jax.nn.log_softmax(logits, axis=1))
        return draft._replace(
            token=draft.token.at[:, node + 1].set(token),
            is_candidate=draft.is_candidate.at[:, node + 1].set(possible[:, 0, 0] & is_complete),
            logprobs=logprobs,
            history=draft.history.record(token[:, None], jnp.ones_like(token)),
        )


def _shape(weight: Weight | Array) -> tuple[int, ...]:
    return tuple(weight.shape)
