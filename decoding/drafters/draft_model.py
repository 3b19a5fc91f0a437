"""Drafts a chain or a tree with a smaller language model, whose own KV cache holds what the target accepts.

Papers: Fast Inference from Transformers via Speculative Decoding (chains), arXiv 2211.17192; SpecInfer (trees of
independent children), arXiv 2305.09781; Sequoia (children without replacement), arXiv 2402.12374.

The tree is drafted level by level, in one compiled loop. Cache updates of draft tokens are staged beside the draft's
cache and committed when the target has accepted the tokens, so nothing rejected enters it. Leaves are drafted but not
run; when one is accepted, the next round begins by running it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from decodax.decoding.chunked_prefill import all_layers, prefill_caches
from decodax.decoding.draft_vocabulary import check_vocabulary
from decodax.decoding.drafters._expand import draw_children
from decodax.decoding.drafters._size import check_chain, set_tree
from decodax.decoding.drafters.contract import Children, Drafter, Outcome, Proposal, fixed_proposal
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.decoding.tree_logits import node_history, node_logits
from decodax.layers.attention.mask import Ancestors
from decodax.layers.kv_cache.staged import place, stage
from decodax.models.model import Model, commit


class _Draft(NamedTuple):
    """A draft in progress. The last entry of token and cache_updates is for the token before the last one.

    The cache lacks that token when the previous round accepted a leaf.

    token: draft tokens so far.
    is_candidate: which of them may be accepted.
    logprobs: from which they were drawn.
    cache_updates: staged.
    """

    token: Int[Array, "B C_plus_1"]
    is_candidate: Bool[Array, "B C"]
    logprobs: Float32[Array, "B C V"] | None
    cache_updates: tuple[Any, ...]


@dataclass(frozen=True)
class DraftModel(Drafter):
    """A draft model; make it with `chain`, `top_k` or `sampled`.

    Its state is its caches, which hold all tokens of a row but the last one, or but the last two.

    model: the draft model.
    parents: the tree, as in `Tree.fixed`.
    children: how they are found.
    """

    model: Model
    parents: tuple[int, ...]
    children: Children = Children.INDEPENDENT
    num_nodes: int = field(init=False)
    max_depth: int = field(init=False)

    auxiliary_weights = "a small language model with the target's tokenizer: `decodax train draft`"

    def __post_init__(self) -> None:
        set_tree(self, self.parents)

    @classmethod
    def chain(cls, model: Model, num_tokens: int) -> "DraftModel":
        """A chain of `num_tokens` tokens drawn from the draft's distribution (in greedy rows the most probable)."""
        check_chain(num_tokens)
        return cls(model, tuple(range(-1, num_tokens)))

    @classmethod
    def top_k(cls, model: Model, parents: Sequence[int]) -> "DraftModel":
        """A fixed tree (`parents` as in `Tree.fixed`) whose children are the most probable tokens, in order."""
        return cls(model, tuple(parents), Children.CHOSEN)

    @classmethod
    def sampled(cls, model: Model, parents: Sequence[int], *, replacement: bool = False) -> "DraftModel":
        """A fixed tree whose children are drawn from the draft's distribution (in greedy rows the most probable).

        With `replacement` they are independent, so that several may be the same token.
        """
        children = Children.INDEPENDENT if replacement else Children.WITHOUT_REPLACEMENT
        return cls(model, tuple(parents), children)

    def constrained(self, draft: Any, model: Model) -> Any:
        return self.model.execution.constrained(draft)

    def check(self, model: Model, draft_params: Any) -> None:
        check_vocabulary(self.model, model)

    def start(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Any, ...]:
        batch, capacity = state.tokens.shape
        caches = self.model.empty_cache(batch, capacity, self.model.dtype(draft_params))
        run = all_layers(self.model, draft_params)
        return prefill_caches(run, caches, state.tokens, state.length, skip=state.failed)

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, tuple[Any, ...]]:
        tree, caches = Tree.fixed(self.parents), state.draft
        lacks_two = state.length - caches[0].length > 1
        levels = jnp.asarray(_levels(tree))
        draft = self._begin(draft_params, state, tree.num_nodes)

        def grow(index: Array, draft: _Draft) -> _Draft:
            level = levels[index]
            logits, updates = self._run_level(draft_params, draft, state, tree, caches, level, lacks_two)
            return self._expand(draft._replace(cache_updates=updates), state, tree, level, logits)

        # The first level is the token before the last one; it runs when some row's cache lacks it.
        first = 1 - jnp.any(lacks_two & ~state.done).astype(jnp.int32)
        draft = jax.lax.fori_loop(first, len(levels), grow, draft)
        token = draft.token[:, : tree.num_nodes]
        forwards = len(levels) - first
        return fixed_proposal(tree, token, draft.is_candidate, logprobs=draft.logprobs, forwards=forwards), (
            caches,
            draft.cache_updates,
        )

    def update(self, params: Any, draft_params: Any, state: DecodeState, outcome: Outcome) -> tuple[Any, ...]:
        caches, updates = state.draft
        has_children = np.isin(np.arange(self.num_nodes), self.parents)  # the others were not run
        num_lacking = state.length - outcome.num_emitted - caches[0].length
        is_accepted = jnp.arange(self.max_depth)[None, :] < outcome.num_emitted[:, None] - 1
        was_run = is_accepted & jnp.asarray(has_children)[outcome.path[:, 1:]]
        count = jnp.where(outcome.num_emitted > 0, num_lacking + jnp.sum(was_run, axis=1, dtype=jnp.int32), 0)
        # The token before the last one, where the cache lacks it; then the last one and those accepted after it.
        path = jnp.pad(outcome.path, ((0, 0), (1, 0)), constant_values=self.num_nodes)
        place_of = jnp.arange(path.shape[1], dtype=jnp.int32)[None, :] + (2 - num_lacking)[:, None]
        return commit(
            caches, updates, count, jnp.take_along_axis(path, jnp.minimum(place_of, path.shape[1] - 1), axis=1)
        )

    def _begin(self, draft_params: Any, state: DecodeState, num_nodes: int) -> _Draft:
        batch = state.tokens.shape[0]
        before = jnp.take_along_axis(state.tokens, jnp.maximum(state.length[:, None] - 2, 0), axis=1)
        token = (
            jnp.zeros((batch, num_nodes + 1), jnp.int32).at[:, 0].set(state.last_token()).at[:, -1].set(before[:, 0])
        )
        logprobs = None
        if state.sampling.do_sample and self.children is not Children.CHOSEN:
            logprobs = jnp.zeros((batch, num_nodes, self.model.vocab_size), jnp.float32)
        dtype = self.model.dtype(draft_params)
        no = jnp.zeros((batch, num_nodes), bool)
        return _Draft(token, no, logprobs, self.model.empty_update(batch, num_nodes + 1, dtype))

    def _run_level(self, draft_params, draft: _Draft, state: DecodeState, tree: Tree, caches, level, lacks_two):
        """Logits at the nodes of a level, and the staged cache updates with theirs; padding is run too, and dropped."""
        num_nodes = tree.num_nodes
        node = jnp.minimum(level, num_nodes)
        own = np.eye(num_nodes + 1, dtype=bool)
        above = np.pad(tree.ancestors[0], ((0, 1), (0, 1))) & ~own
        above = jnp.broadcast_to(jnp.asarray(above)[node], (len(lacks_two), level.shape[0], num_nodes + 1))
        attends_before = lacks_two[:, None] & (node < num_nodes)[None, :]
        above = above.at[:, :, -1].set(attends_before)
        themselves = jnp.broadcast_to(jnp.eye(level.shape[0], dtype=bool), (*above.shape[:2], level.shape[0]))
        depth = jnp.pad(jnp.asarray(tree.depth), ((0, 0), (0, 1)), constant_values=-1)
        position = jnp.maximum(state.length[:, None] - 1 + depth, 0)
        staged = stage(caches, draft.cache_updates, position)
        mask = Ancestors(jnp.concatenate([above, themselves], axis=2))
        out = self.model.apply(draft_params, draft.token[:, node], position[:, node], staged, mask=mask)
        return self.model.logits(draft_params, out.hidden), place(draft.cache_updates, out.cache_updates, level)

    def _expand(self, draft: _Draft, state: DecodeState, tree: Tree, level: Array, logits: Array) -> _Draft:
        """Adds the children of a level's nodes.

        The most probable ones do not depend on what shapes a draw. Without that, a greedy row beside sampled ones gets
        the same children as alone.
        """
        kind = self.children if state.sampling.do_sample else Children.CHOSEN
        sampling = state.sampling.greedy if kind is Children.CHOSEN else state.sampling
        history = node_history(state.history, tree, draft.token[:, : tree.num_nodes])
        node = jnp.minimum(level, tree.num_nodes - 1)
        logits = node_logits(sampling, logits, jax.tree.map(lambda counts: counts[:, node], history))
        children = jnp.asarray(_children(tree))[level]
        position = state.length[:, None] + jnp.asarray(tree.depth)[:, node]
        token, is_possible = draw_children(logits, kind, children.shape[1], state.seed, position)
        slot, batch, logprobs = children.reshape(-1), token.shape[0], draft.logprobs
        if logprobs is not None:
            logprobs = logprobs.at[:, level].set(jax.nn.log_softmax(logits, axis=2), mode="drop")
        return draft._replace(
            token=draft.token.at[:, slot].set(token.reshape(batch, -1), mode="drop"),
            is_candidate=draft.is_candidate.at[:, slot].set(is_possible.reshape(batch, -1), mode="drop"),
            logprobs=logprobs,
        )


def _levels(tree: Tree) -> Int[np.ndarray, "I W"]:
    """The levels to run: the token before the last one (C), the root, then the nodes with children at each depth.

    Padded with C + 1.
    """
    parent, depth = tree.parent[0], tree.depth[0]
    inner = np.unique(parent[1:])
    levels = [[tree.num_nodes], *(inner[depth[inner] == level] for level in range(int(depth.max())))]
    return _padded(levels, tree.num_nodes + 1)


def _children(tree: Tree) -> Int[np.ndarray, "C_plus_2 I"]:
    """The children of each node in order; none of the token before the last one (C), nor of padding (C + 1)."""
    return _padded([np.flatnonzero(tree.parent[0] == node) for node in range(tree.num_nodes + 2)], tree.num_nodes + 1)


def _padded(lists: Sequence[Sequence[int] | np.ndarray], filling: int) -> np.ndarray:
    width = max(len(nodes) for nodes in lists)
    return np.array([[*nodes, *[filling] * (width - len(nodes))] for nodes in lists], np.int32)
