"""Drafts with trained prompt tokens, run in the same forward that verifies the previous draft (PPD).

Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference, arXiv 2405.18628. A chain of
prompt tokens, which are trained embeddings, follows the last token and every candidate; nothing else is trained. The
logits at the i-th of them predict the token i positions further on. The chain after the last accepted candidate gives
the draft tokens of the next round. Prompt tokens are not candidates, so they never enter a cache, and no candidate
attends to them.

An ensemble has several chains after a candidate, none of which attends to the others, and averages their logits.

Departs from the authors' code in that the first prompt tokens run in the first round, which drafts nothing, and not in
prefill.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from decodax.core import pytree
from decodax.decoding.drafters._size import set_size
from decodax.decoding.drafters.contract import Drafter, Outcome, Proposal, fixed_proposal
from decodax.decoding.drafters.wider_proposals import LayerProposal
from decodax.decoding.prompt_tree import PromptTree
from decodax.decoding.prompt_tree_tables import PromptTables, prompt_table
from decodax.decoding.ranked_tokens import sibling_ranks, top_k_per_distance, tree_tokens
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.models.model import Model


@pytree.dataclass
class RankedTokens:
    """The drafter's state.

    token[b, d, r]: the r-th most probable token at distance d + 1 after the last one.
    distances[b]: the number of distances with tokens.
    """

    token: Int[Array, "B m R"]
    distances: Int[Array, " B"]


@dataclass(frozen=True)
class PromptTokens(Drafter):
    """Trees of candidates and prompt tokens. `draft_params` is {"embedding": Float[m, n, D]}, n the `ensemble`.

    model: the target.
    trees: from `decoding/prompt_tree.py`; `trees[k - 1]` drafts where k distances have tokens, a single tree in every
        state.
    ensemble: chains of prompt tokens after each candidate.
    """

    model: Model
    trees: tuple[PromptTree, ...]
    ensemble: int = 1
    num_nodes: int = field(init=False)
    max_depth: int = field(init=False)

    auxiliary_weights = "embeddings of prompt tokens: `decodax train ppd`"

    def __post_init__(self) -> None:
        if not self.trees:
            raise ValueError("prompt tokens need at least one tree")
        if len(self.trees) > 1 and len(self.trees) != self.distances:
            raise ValueError(
                f"there must be one tree for each of the {self.distances} states, or one for all, got {len(self.trees)}"
            )
        for state, tree in enumerate(self.trees, start=1 if len(self.trees) > 1 else self.distances):
            if tree.depth > state:
                raise ValueError(f"a tree for {state} distances must not be deeper, got depth {tree.depth}")
        set_size(
            self, max(tree.num_nodes(self.ensemble) for tree in self.trees), max(tree.depth for tree in self.trees)
        )

    @property
    def distances(self) -> int:
        """m: prompt tokens after the root."""
        return max(tree.prompts[0] for tree in self.trees)

    @property
    def num_ranks(self) -> int:
        """The largest number of tokens that a tree uses at a distance."""
        return int(max(sibling_ranks(tree.parents).max() for tree in self.trees)) + 1

    @cached_property
    def _tables(self) -> PromptTables:
        tables = [prompt_table(tree, self.ensemble, self.distances, self.num_nodes) for tree in self.trees]
        return PromptTables(*(np.stack(arrays) for arrays in zip(*tables, strict=True)))

    @cached_property
    def _shapes(self) -> tuple[Tree, ...]:
        return tuple(Tree.fixed(parent.tolist()) for parent in self._tables.parent)

    def check(self, model: Model, draft_params: Any) -> None:
        expected = (self.distances, self.ensemble, model.config.hidden_size)
        found = draft_params["embedding"].shape
        if len(found) != 3 or found[1:] != expected[1:] or found[0] < expected[0]:
            raise ValueError(
                f"prompt tokens must be embeddings of shape {expected} (distances, ensemble, hidden size) for this "
                f"model and these trees, got {tuple(found)}: train them for it, or give trees for fewer distances"
            )

    def start(self, params: Any, draft_params: Any, state: DecodeState) -> RankedTokens:
        batch = state.tokens.shape[0]
        token = jnp.zeros((batch, self.distances, self.num_ranks), jnp.int32)
        return RankedTokens(token, jnp.zeros(batch, jnp.int32))

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, RankedTokens]:
        ranked, tables = state.draft, self._tables
        index = self._tree_index(ranked)
        tree = self._tree(index)
        token = tree_tokens(ranked.token, state.last_token(), tree.depth, jnp.asarray(tables.rank)[index])
        token = jnp.where(jnp.asarray(tables.distance)[index] > 0, 0, token)
        is_candidate = jnp.asarray(tables.is_candidate)[index] & (ranked.distances > 0)[:, None]
        distance, member = jnp.asarray(tables.distance)[index], jnp.asarray(tables.member)[index]
        prompt = draft_params["embedding"][jnp.maximum(distance - 1, 0), member]
        position = state.length[:, None] - 1 + jnp.asarray(tree.depth)
        embedded = self.model.embed(params, token, position)
        vectors = jnp.where((distance > 0)[..., None], prompt.astype(embedded.dtype), embedded)
        proposal = fixed_proposal(tree, token, is_candidate)
        return LayerProposal.extend(proposal, vectors), ranked

    def update(self, params: Any, draft_params: Any, state: DecodeState, outcome: Outcome) -> RankedTokens:
        before, tables = state.draft, self._tables
        index = self._tree_index(before)
        last = jnp.take_along_axis(outcome.path, jnp.maximum(outcome.num_emitted - 1, 0)[:, None], axis=1)[:, 0]
        node = jnp.asarray(tables.prompt_node)[index, last]
        batch, ensemble, distances = node.shape
        logits = jnp.take_along_axis(outcome.logits, node.reshape(batch, -1, 1), axis=1)
        logits = jnp.mean(logits.reshape(batch, ensemble, distances, -1), axis=1)
        token, _ = top_k_per_distance(logits, self.num_ranks)
        is_active = outcome.num_emitted > 0
        return RankedTokens(
            jnp.where(is_active[:, None, None], token, before.token),
            jnp.where(is_active, jnp.asarray(tables.num_prompts)[index, last], before.distances),
        )

    def _tree_index(self, ranked: RankedTokens) -> Int[Array, " B"]:
        """Which tree drafts; where there are no tokens yet, the one for the most distances."""
        states = len(self.trees)
        return jnp.where(ranked.distances > 0, jnp.minimum(ranked.distances, states), states) - 1

    def _tree(self, index: Int[Array, " B"]) -> Tree:
        if len(self.trees) == 1:
            return self._shapes[0]
        depth, ancestors = (
            jnp.asarray(np.concatenate([getattr(tree, name) for tree in self._shapes]))[index]
            for name in ("depth", "ancestors")
        )
        return Tree(jnp.asarray(self._tables.parent)[index], depth, ancestors)
