"""Drafts with a draft model that itself decodes speculatively: speculative decoding inside a drafter.

As in Hardware-Aware Parallel Prompt Decoding (section 5, with speculative decoding), arXiv 2405.18628: prompt tokens of
the draft model draft for it, so that a chain of its tokens takes fewer of its forwards. The chain is the one that plain
greedy decoding of the draft model gives.

The draft's caches hold its own tokens, of which the target may reject the last ones. Most caches can be rewound to the
accepted text. If one cannot (a recurrent state), it is kept as it was before the round, and one more forward of the
draft model runs the tokens accepted since.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from decodax.decoding.chunked_prefill import all_layers, prefill_caches
from decodax.decoding.draft_vocabulary import check_vocabulary
from decodax.decoding.drafters._size import set_chain
from decodax.decoding.drafters.contract import Drafter, Outcome, Proposal, fixed_proposal
from decodax.decoding.logits_processors import History
from decodax.decoding.loop import run_until_done
from decodax.decoding.sampling import Sampling
from decodax.decoding.speculative_decoding import Speculative
from decodax.decoding.state import DecodeState, LayerCounts
from decodax.decoding.tree import Tree
from decodax.layers.kv_cache.contract import Rewindable
from decodax.models.model import Model, commit


@dataclass(frozen=True)
class NestedDraft(Drafter):
    """A chain of tokens decoded by a draft model with its own drafter.

    `draft_params` is {"model": the draft model's, "drafter": those of the inner drafter}. The inner drafter is started
    again in every round, so it should be one that keeps nothing of the text (prompt tokens, heads, lookup).

    inner: decodes the draft model.
    num_tokens: of a draft; `inner` decodes one more, so that its cache never lacks one.
    """

    inner: Speculative
    num_tokens: int
    num_nodes: int = field(init=False)
    max_depth: int = field(init=False)

    auxiliary_weights = "a draft model with prompt tokens of its own: `decodax train draft`, then `decodax train ppd`"

    def __post_init__(self) -> None:
        set_chain(self, self.num_tokens)

    def check(self, model: Model, draft_params: Any) -> None:
        check_vocabulary(self.inner.model, model)
        self.inner.drafter.check(self.inner.model, draft_params["drafter"])

    def start(self, params: Any, draft_params: Any, state: DecodeState) -> DecodeState:
        model, (batch, capacity) = self.inner.model, state.tokens.shape
        vocab_size = model.vocab_size
        run = all_layers(model, draft_params["model"])
        caches = model.empty_cache(batch, capacity, model.dtype(draft_params["model"]))
        caches = prefill_caches(run, caches, state.tokens, state.length, skip=state.failed)
        inner = dataclasses.replace(
            state,
            stop_token_ids=state.stop_token_ids[:, :0],
            caches=caches,
            history=History.start(state.tokens, state.length, vocab_size=vocab_size, with_counts=False),
            sampling=Sampling((), False),
            layer_counts=LayerCounts.zero(batch),
            layer_policy=(),
        )
        return self._started(draft_params, inner, state)

    def constrained(self, draft: DecodeState, model: Model) -> DecodeState:
        inner = self.inner
        own = inner.model.execution.constrained(dataclasses.replace(draft, draft=None))
        return dataclasses.replace(own, draft=inner.drafter.constrained(draft.draft, inner.model))

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, DecodeState]:
        inner = self._started(draft_params, state.draft, state)
        before = inner.caches
        step = lambda inner: self.inner.step(draft_params["model"], draft_params["drafter"], inner)
        inner = run_until_done(step, inner, None, self.inner.model.execution)
        position = state.length[:, None] - 1 + jnp.arange(self.num_nodes, dtype=jnp.int32)[None, :]
        token = jnp.take_along_axis(inner.tokens, jnp.minimum(position, inner.tokens.shape[1] - 1), axis=1)
        is_candidate = position < inner.length[:, None]
        forwards = inner.num_target_forwards + (0 if _can_rewind(before) else 1)  # with the one of `update`
        # Caches that can be rewound need not be kept twice.
        pairs = zip(before, inner.caches, strict=True)
        inner = dataclasses.replace(inner, caches=tuple(new if _can_rewind((new,)) else old for old, new in pairs))
        return fixed_proposal(Tree.chain(self.num_nodes), token, is_candidate, forwards=forwards), inner

    def update(self, params: Any, draft_params: Any, state: DecodeState, outcome: Outcome) -> DecodeState:
        """The inner state with caches that hold the accepted text, where `_started` cannot rewind them to it."""
        inner: DecodeState = state.draft
        if _can_rewind(inner.caches):
            return inner
        num_cached = next(cache.length for cache in inner.caches if not _can_rewind((cache,)))
        caches = _rewound(inner.caches, num_cached)
        position = num_cached[:, None] + jnp.arange(self.num_tokens + 1, dtype=jnp.int32)[None, :]
        last = state.tokens.shape[1] - 1
        token = jnp.take_along_axis(state.tokens, jnp.minimum(position, last), axis=1)
        out = self.inner.model.apply(draft_params["model"], token, position, caches)
        return dataclasses.replace(inner, caches=commit(caches, out.cache_updates, outcome.num_emitted))

    def _started(self, draft_params: Any, inner: DecodeState, state: DecodeState) -> DecodeState:
        """The inner state at the target's text, without the tokens that the target rejected."""
        capacity = state.tokens.shape[1]
        limit = jnp.minimum(state.length + self.num_tokens + 1, capacity)
        inner = dataclasses.replace(
            inner,
            tokens=state.tokens,
            length=state.length,
            limit=limit,
            done=state.done | (state.length >= limit),
            failed=jnp.zeros_like(state.done),
            caches=_rewound(inner.caches, state.length - 1),
            num_target_forwards=jnp.int32(0),
        )
        return self.inner.start(draft_params["model"], draft_params["drafter"], inner)


def _can_rewind(caches: tuple[Any, ...]) -> bool:
    return all(isinstance(cache, Rewindable) for cache in caches)


def _rewound(caches: tuple[Any, ...], length: Int[Array, " B"]) -> tuple[Any, ...]:
    """The caches, rewound to `length` where they can be."""
    return tuple(cache.rewound(length) if isinstance(cache, Rewindable) else cache for cache in caches)
