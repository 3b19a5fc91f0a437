"""A smaller language model drafts, as a chain or as a tree; its own cache follows what the target accepts.

Papers: Fast Inference from Transformers via Speculative Decoding (chains), arXiv 2211.17192; SpecInfer (trees of
independent children), arXiv 2305.09781; Sequoia (children without replacement), arXiv 2402.12374.

The tree is drafted level by level. Rows of draft tokens are staged beside the draft's cache and committed when the
target has accepted them, so nothing rejected ever enters it. Leaves are drafted but not run; when one is accepted, the
next round begins by reading it together with the pending token.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from decodax.decoding.drafters._contract import Children, Drafter, Outcome, Proposal, fixed_proposal
from decodax.decoding.drafters._expand import draw_children, expansion
from decodax.decoding.node_laws import node_history, node_logits
from decodax.decoding.state import DecodeState, read_chunk
from decodax.decoding.tree import Tree
from decodax.layers.attention.mask import Ancestors
from decodax.layers.kv_cache.staged import place, stage
from decodax.models.model import Model, commit

PROMPT_CHUNK = 128  # prompt tokens that the draft reads per forward


class _Open(NamedTuple):
    """A draft under way: tokens so far, which of them may be accepted, the laws they came from, staged rows."""

    token: Int[Array, "B C"]
    is_candidate: Bool[Array, "B C"]
    law: Float32[Array, "B C V"] | None
    rows: tuple[Any, ...]


@dataclass(frozen=True)
class DraftModel(Drafter):
    """`parents` is the tree (see `Tree.fixed`); make it with `chain`, `tree` or `sampled_tree`.

    Its state is its caches, which hold all tokens of a row but the pending one, or but the last two.
    """

    model: Model
    parents: tuple[int, ...]
    children: Children = Children.INDEPENDENT
    num_nodes: int = field(init=False)
    max_depth: int = field(init=False)

    trained_part = "a small language model with the target's vocabulary: `decodax train draft`"

    def __post_init__(self) -> None:
        tree = Tree.fixed(self.parents)
        if tree.num_nodes < 2:
            raise ValueError("a draft must hold at least 1 token, got 0: for none, use the strategy 'autoregressive'")
        object.__setattr__(self, "num_nodes", tree.num_nodes)
        object.__setattr__(self, "max_depth", int(np.max(tree.depth)))

    @classmethod
    def chain(cls, model: Model, num_tokens: int) -> "DraftModel":
        """`num_tokens` tokens one after the other, each drawn from the draft's law (the likeliest in greedy rows)."""
        if num_tokens < 1:
            raise ValueError(f"a draft must hold at least 1 token, got {num_tokens}")
        return cls(model, tuple(range(-1, num_tokens)))

    @classmethod
    def tree(cls, model: Model, branches: tuple[int, ...]) -> "DraftModel":
        """A fixed tree: every node of level d has the `branches[d]` likeliest tokens as its children."""
        return cls(model, expansion(branches), Children.CHOSEN)

    @classmethod
    def sampled_tree(cls, model: Model, branches: tuple[int, ...], *, replacement: bool = False) -> "DraftModel":
        """A tree whose children are drawn from the draft's law; in greedy rows they are the likeliest.

        With `replacement` they are independent, so that several may be the same token.
        """
        children = Children.INDEPENDENT if replacement else Children.WITHOUT_REPLACEMENT
        return cls(model, expansion(branches), children)

    def check(self, model: Model, draft_params: Any) -> None:
        mine, wanted = self.model.config.vocab_size, model.config.vocab_size
        if mine != wanted:
            raise ValueError(
                f"a draft must have the target's vocabulary of {wanted} tokens, got {mine}: choose a draft made for "
                "this model, or train one with `decodax train draft`"
            )

    def start(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Any, ...]:
        batch, capacity = state.tokens.shape
        chunk = min(PROMPT_CHUNK, capacity)

        def read(index: Array, caches: tuple[Any, ...]) -> tuple[Any, ...]:
            start = index * chunk
            return read_chunk(
                self.model, draft_params, caches, state.tokens, state.length, start, chunk, skip=state.failed
            )[0]

        caches = self.model.empty_cache(batch, capacity, jax.tree.leaves(draft_params)[0].dtype)
        num_chunks = (jnp.max(state.length) - 1 + chunk - 1) // chunk
        return jax.lax.fori_loop(0, num_chunks, read, caches)

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, tuple[Any, ...]]:
        tree = Tree.fixed(self.parents)
        logits, is_sound, caches = self._catch_up(draft_params, state)
        levels = _levels(tree)
        batch, vocab_size = logits.shape[0], logits.shape[2]
        keeps_law = state.sampling.draws and self.children is not Children.CHOSEN
        draft = _Open(
            token=jnp.zeros((batch, tree.num_nodes), jnp.int32).at[:, 0].set(state.pending()),
            is_candidate=jnp.zeros((batch, tree.num_nodes), bool),
            law=jnp.zeros((batch, tree.num_nodes, vocab_size), jnp.float32) if keeps_law else None,
            rows=self.model.empty_rows(batch, tree.num_nodes, jax.tree.leaves(caches)[0].dtype),
        )
        draft = self._expand(draft, state, tree, jnp.zeros(1, jnp.int32), logits)

        def grow(index: Array, draft: _Open) -> _Open:
            level = jnp.asarray(levels)[index]
            logits, rows = self._run_level(draft_params, draft, state, tree, caches, level, index + 1)
            return self._expand(draft._replace(rows=rows), state, tree, level, logits)

        draft = jax.lax.fori_loop(0, len(levels), grow, draft)
        proposal = fixed_proposal(
            tree, draft.token, draft.is_candidate & is_sound[:, None], law=draft.law, forwards=1 + len(levels)
        )
        return proposal, (caches, draft.rows)

    def update(self, params: Any, draft_params: Any, state: DecodeState, outcome: Outcome) -> tuple[Any, ...]:
        caches, rows = state.draft
        has_children = np.isin(np.arange(self.num_nodes), self.parents)
        path = outcome.path[:, 1:]
        is_accepted = jnp.arange(path.shape[1])[None, :] < outcome.num_emitted[:, None] - 1
        count = jnp.sum(is_accepted & jnp.asarray(has_children)[path], axis=1, dtype=jnp.int32)
        return commit(caches, rows, count, path)

    def _catch_up(self, draft_params: Any, state: DecodeState) -> tuple[Array, Bool[Array, " B"], tuple[Any, ...]]:
        """Reads the one or two tokens that the cache lacks; gives the logits after the pending one."""
        caches = state.draft
        missing = jnp.clip(state.length - caches[0].length, 0, 2)
        position = caches[0].length[:, None] + jnp.arange(2, dtype=jnp.int32)[None, :]
        window = jnp.take_along_axis(state.tokens, jnp.minimum(position, state.tokens.shape[1] - 1), axis=1)
        out = self.model.apply(draft_params, window, position, caches)
        hidden = jnp.take_along_axis(out.hidden, jnp.maximum(missing - 1, 0)[:, None, None], axis=1)
        logits = self.model.logits(draft_params, hidden)
        # A draft that is not finite proposes nothing; and the commit waits for what was read (see KVCache.commit).
        is_sound = jnp.isfinite(jnp.max(logits, axis=(1, 2)))
        return logits, is_sound, commit(caches, out.rows, jnp.where(is_sound, missing, 0))

    def _run_level(self, draft_params, draft: _Open, state: DecodeState, tree: Tree, caches, level, depth):
        """Logits after the nodes of a level, and the staged rows with theirs; padding runs along and is dropped."""
        above = jnp.asarray(tree.ancestors[0] & ~np.eye(tree.num_nodes, dtype=bool)).at[:, 0].set(False)
        node = jnp.minimum(level, tree.num_nodes - 1)
        allowed = jnp.concatenate([above[node], jnp.eye(level.shape[0], dtype=bool)], axis=1)[None]
        base = state.length[:, None] - 1
        staged = stage(caches, draft.rows, base + jnp.asarray(tree.depth))
        position = jnp.broadcast_to(base + depth, (base.shape[0], level.shape[0]))
        out = self.model.apply(draft_params, draft.token[:, node], position, staged, mask=Ancestors(allowed))
        return self.model.logits(draft_params, out.hidden), place(draft.rows, out.rows, level)

    def _expand(self, draft: _Open, state: DecodeState, tree: Tree, level: Array, logits: Array) -> _Open:
        """Adds the children of a level's nodes."""
        history = node_history(state.history, tree, draft.token)
        node = jnp.minimum(level, tree.num_nodes - 1)
        history = jax.tree.map(lambda counts: counts[:, node], history)
        logits = node_logits(state.sampling, logits, history)
        children = jnp.asarray(_children(tree))[level]
        depth = jnp.asarray(tree.depth)[0, node]
        position = state.length[:, None] + depth[None, :]
        kind = self.children if state.sampling.draws else Children.CHOSEN
        token, is_possible = draw_children(logits, kind, children.shape[1], state.seed, position)
        slot = children.reshape(-1)
        batch = token.shape[0]
        law = draft.law
        if law is not None:
            law = law.at[:, level].set(jax.nn.log_softmax(logits, axis=2), mode="drop")
        return draft._replace(
            token=draft.token.at[:, slot].set(token.reshape(batch, -1), mode="drop"),
            is_candidate=draft.is_candidate.at[:, slot].set(is_possible.reshape(batch, -1), mode="drop"),
            law=law,
        )


def _levels(tree: Tree) -> Int[np.ndarray, "I W"]:
    """Nodes with children, one row per depth from 1 on, padded with C."""
    parent, depth = tree.parent[0], tree.depth[0]
    inner = np.unique(parent[1:])
    rows = [inner[depth[inner] == level] for level in range(1, int(depth.max()))]
    width = max((len(row) for row in rows), default=1)
    return np.array([[*row, *[tree.num_nodes] * (width - len(row))] for row in rows], np.int32).reshape(-1, width)


def _children(tree: Tree) -> Int[np.ndarray, "C_plus_1 I"]:
    """The children of each node in order, padded with C; the last row is the padding node's."""
    lists = [np.flatnonzero(tree.parent[0] == node) for node in range(tree.num_nodes + 1)]
    width = max(len(row) for row in lists)
    return np.array([[*row, *[tree.num_nodes] * (width - len(row))] for row in lists], np.int32)
