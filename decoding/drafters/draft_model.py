"""A smaller language model drafts, as a chain or as a tree; its own cache follows what the target accepts.

Papers: Fast Inference from Transformers via Speculative Decoding (chains), arXiv 2211.17192; SpecInfer (trees of
independent children), arXiv 2305.09781; Sequoia (children without replacement), arXiv 2402.12374.

The tree is drafted level by level, in one compiled loop. Rows of draft tokens are staged beside the draft's cache and
committed when the target has accepted them, so nothing rejected ever enters it. Leaves are drafted but not run; when
one has been accepted, the next round begins by running it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from decodax.decoding.draft_vocabulary import check_vocabulary
from decodax.decoding.drafters._contract import Children, Drafter, Outcome, Proposal, fixed_proposal
from decodax.decoding.drafters._expand import draw_children
from decodax.decoding.drafters._size import check_chain, set_tree
from decodax.decoding.node_laws import node_history, node_logits
from decodax.decoding.prompt_reading import all_layers, read_prompt_chunks
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.layers.attention.mask import Ancestors
from decodax.layers.kv_cache.staged import place, stage
from decodax.models.model import Model, commit


class _Draft(NamedTuple):
    """A draft under way: tokens so far, which of them may be accepted, the laws they came from, staged rows.

    token and rows have one place more than the tree has nodes: the last is for the token before the pending one, which
    the cache lacks when the round before accepted a leaf.
    """

    token: Int[Array, "B C_plus_1"]
    is_candidate: Bool[Array, "B C"]
    law: Float32[Array, "B C V"] | None
    rows: tuple[Any, ...]


@dataclass(frozen=True)
class DraftModel(Drafter):
    """`parents` is the tree (see `Tree.fixed`); make it with `chain`, `likeliest` or `sampled`.

    Its state is its caches, which hold all tokens of a row but the pending one, or but the last two.
    """

    model: Model
    parents: tuple[int, ...]
    children: Children = Children.INDEPENDENT
    num_nodes: int = field(init=False)
    max_depth: int = field(init=False)

    trained_part = "a small language model with the target's tokenizer: `decodax train draft`"

    def __post_init__(self) -> None:
        set_tree(self, self.parents)

    @classmethod
    def chain(cls, model: Model, num_tokens: int) -> "DraftModel":
        """`num_tokens` tokens one after the other, each drawn from the draft's law (the likeliest in greedy rows)."""
        check_chain(num_tokens)
        return cls(model, tuple(range(-1, num_tokens)))

    @classmethod
    def likeliest(cls, model: Model, parents: Sequence[int]) -> "DraftModel":
        """A fixed tree (`parents` as in `Tree.fixed`) whose nodes have the likeliest tokens as children, in order."""
        return cls(model, tuple(parents), Children.CHOSEN)

    @classmethod
    def sampled(cls, model: Model, parents: Sequence[int], *, replacement: bool = False) -> "DraftModel":
        """A fixed tree whose children are drawn from the draft's law; in greedy rows they are the likeliest.

        With `replacement` they are independent, so that several may be the same token.
        """
        children = Children.INDEPENDENT if replacement else Children.WITHOUT_REPLACEMENT
        return cls(model, tuple(parents), children)

    def laid_out(self, draft: Any, model: Model) -> Any:
        return self.model.execution.laid_out(draft)

    def check(self, model: Model, draft_params: Any) -> None:
        check_vocabulary(self.model, model)

    def start(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Any, ...]:
        batch, capacity = state.tokens.shape
        caches = self.model.empty_cache(batch, capacity, jax.tree.leaves(draft_params)[0].dtype)
        run = all_layers(self.model, draft_params)
        return read_prompt_chunks(run, caches, state.tokens, state.length, skip=state.failed)

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, tuple[Any, ...]]:
        tree, caches = Tree.fixed(self.parents), state.draft
        lacks_two = state.length - caches[0].length > 1
        levels = jnp.asarray(_levels(tree))
        draft = self._begin(draft_params, state, tree.num_nodes)

        def grow(index: Array, draft: _Draft) -> _Draft:
            level = levels[index]
            logits, rows = self._run_level(draft_params, draft, state, tree, caches, level, lacks_two)
            return self._expand(draft._replace(rows=rows), state, tree, level, logits)

        # The first level is the token before the pending one; it is run when some row's cache lacks it.
        first = 1 - jnp.any(lacks_two & ~state.done).astype(jnp.int32)
        draft = jax.lax.fori_loop(first, len(levels), grow, draft)
        token = draft.token[:, : tree.num_nodes]
        forwards = len(levels) - first
        return fixed_proposal(tree, token, draft.is_candidate, law=draft.law, forwards=forwards), (caches, draft.rows)

    def update(self, params: Any, draft_params: Any, state: DecodeState, outcome: Outcome) -> tuple[Any, ...]:
        caches, rows = state.draft
        has_children = np.isin(np.arange(self.num_nodes), self.parents)  # the others were not run
        num_lacking = state.length - outcome.num_emitted - caches[0].length
        is_accepted = jnp.arange(self.max_depth)[None, :] < outcome.num_emitted[:, None] - 1
        was_run = is_accepted & jnp.asarray(has_children)[outcome.path[:, 1:]]
        count = jnp.where(outcome.num_emitted > 0, num_lacking + jnp.sum(was_run, axis=1, dtype=jnp.int32), 0)
        # The token before the pending one, where it is lacking; then the pending one and those accepted after it.
        path = jnp.pad(outcome.path, ((0, 0), (1, 0)), constant_values=self.num_nodes)
        place_of = jnp.arange(path.shape[1], dtype=jnp.int32)[None, :] + (2 - num_lacking)[:, None]
        return commit(caches, rows, count, jnp.take_along_axis(path, jnp.minimum(place_of, path.shape[1] - 1), axis=1))

    def _begin(self, draft_params: Any, state: DecodeState, num_nodes: int) -> _Draft:
        batch = state.tokens.shape[0]
        before = jnp.take_along_axis(state.tokens, jnp.maximum(state.length[:, None] - 2, 0), axis=1)
        token = jnp.zeros((batch, num_nodes + 1), jnp.int32).at[:, 0].set(state.pending()).at[:, -1].set(before[:, 0])
        law = None
        if state.sampling.draws and self.children is not Children.CHOSEN:
            law = jnp.zeros((batch, num_nodes, self.model.vocab_size), jnp.float32)
        dtype = jax.tree.leaves(draft_params)[0].dtype
        no = jnp.zeros((batch, num_nodes), bool)
        return _Draft(token, no, law, self.model.empty_rows(batch, num_nodes + 1, dtype))

    def _run_level(self, draft_params, draft: _Draft, state: DecodeState, tree: Tree, caches, level, lacks_two):
        """Logits after the nodes of a level, and the staged rows with theirs; padding runs along and is dropped."""
        num_nodes = tree.num_nodes
        node = jnp.minimum(level, num_nodes)
        own = np.eye(num_nodes + 1, dtype=bool)
        above = np.pad(tree.ancestors[0], ((0, 1), (0, 1))) & ~own
        above = jnp.broadcast_to(jnp.asarray(above)[node], (len(lacks_two), level.shape[0], num_nodes + 1))
        reads_before = lacks_two[:, None] & (node < num_nodes)[None, :]
        above = above.at[:, :, -1].set(reads_before)
        themselves = jnp.broadcast_to(jnp.eye(level.shape[0], dtype=bool), (*above.shape[:2], level.shape[0]))
        depth = jnp.pad(jnp.asarray(tree.depth), ((0, 0), (0, 1)), constant_values=-1)
        position = jnp.maximum(state.length[:, None] - 1 + depth, 0)
        staged = stage(caches, draft.rows, position)
        mask = Ancestors(jnp.concatenate([above, themselves], axis=2))
        out = self.model.apply(draft_params, draft.token[:, node], position[:, node], staged, mask=mask)
        return self.model.logits(draft_params, out.hidden), place(draft.rows, out.rows, level)

    def _expand(self, draft: _Draft, state: DecodeState, tree: Tree, level: Array, logits: Array) -> _Draft:
        """Adds the children of a level's nodes."""
        history = node_history(state.history, tree, draft.token[:, : tree.num_nodes])
        node = jnp.minimum(level, tree.num_nodes - 1)
        logits = node_logits(state.sampling, logits, jax.tree.map(lambda counts: counts[:, node], history))
        children = jnp.asarray(_children(tree))[level]
        position = state.length[:, None] + jnp.asarray(tree.depth)[:, node]
        kind = self.children if state.sampling.draws else Children.CHOSEN
        token, is_possible = draw_children(logits, kind, children.shape[1], state.seed, position)
        slot, batch, law = children.reshape(-1), token.shape[0], draft.law
        if law is not None:
            law = law.at[:, level].set(jax.nn.log_softmax(logits, axis=2), mode="drop")
        return draft._replace(
            token=draft.token.at[:, slot].set(token.reshape(batch, -1), mode="drop"),
            is_candidate=draft.is_candidate.at[:, slot].set(is_possible.reshape(batch, -1), mode="drop"),
            law=law,
        )


def _levels(tree: Tree) -> Int[np.ndarray, "I W"]:
    """What to run: the token before the pending one (C), the root, then the nodes with children of each depth.

    Padded with C + 1.
    """
    parent, depth = tree.parent[0], tree.depth[0]
    inner = np.unique(parent[1:])
    rows = [[tree.num_nodes], *(inner[depth[inner] == level] for level in range(int(depth.max())))]
    return _padded(rows, tree.num_nodes + 1)


def _children(tree: Tree) -> Int[np.ndarray, "C_plus_2 I"]:
    """The children of each node in order; none of the token before the pending one (C), nor of padding (C + 1)."""
    return _padded([np.flatnonzero(tree.parent[0] == node) for node in range(tree.num_nodes + 2)], tree.num_nodes + 1)


def _padded(rows: Sequence[Sequence[int] | np.ndarray], filling: int) -> np.ndarray:
    width = max(len(row) for row in rows)
    return np.array([[*row, *[filling] * (width - len(row))] for row in rows], np.int32)
