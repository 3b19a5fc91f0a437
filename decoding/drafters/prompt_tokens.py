"""Trained prompt tokens behind the text guess several tokens ahead, in the very forward that verifies the last guesses.

Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference, arXiv 2405.18628. Behind the
pending token and behind every candidate stands a chain of prompt tokens: embeddings that are trained, nothing else is.
The logits at the i-th of them say what comes i tokens further on. The chain behind the last accepted candidate makes
the guesses of the next round. Prompt tokens are no candidates, so they never enter a cache, and no candidate reads one.

An ensemble has several chains behind a candidate, each of which reads only itself, and averages their logits.

Departs from the authors' code in that the first prompt tokens ride along with the first round, which drafts nothing,
and not with the prompt.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from decodax.decoding.drafters._contract import Drafter, Outcome, Proposal, fixed_proposal
from decodax.decoding.drafters._guesses import best_guesses, sibling_ranks, tree_tokens
from decodax.decoding.drafters._size import set_size
from decodax.decoding.prompt_tree import PromptTree
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.layers import pytree
from decodax.models.model import Model


@pytree.dataclass
class Guesses:
    """token[b, d, r]: the r-th guess for distance d + 1 behind the pending token; `distances[b]` of them are there."""

    token: Int[Array, "B m R"]
    distances: Int[Array, " B"]


class _Tables(NamedTuple):
    """What the trees come to, one entry per state; trees are filled up to one size with nodes that do nothing.

    distance: 0 for a candidate, i for the i-th prompt token. prompt_node[s, c, e, i]: that of member e behind candidate
    c. num_prompts: behind each candidate.
    """

    parent: Int[np.ndarray, "I C"]
    rank: Int[np.ndarray, "I C"]
    is_candidate: Bool[np.ndarray, "I C"]
    distance: Int[np.ndarray, "I C"]
    member: Int[np.ndarray, "I C"]
    prompt_node: Int[np.ndarray, "I C n m"]
    num_prompts: Int[np.ndarray, "I C"]


@dataclass(frozen=True)
class PromptTokens(Drafter):
    """`trees[k - 1]` drafts where guesses for k distances are there; a single tree serves every state.

    Make the trees with `decoding/prompt_tree.py`. `draft_params` is {"embedding": Float[m, n, D]}, n the `ensemble`.
    """

    model: Model
    trees: tuple[PromptTree, ...]
    ensemble: int = 1
    num_nodes: int = field(init=False)
    max_depth: int = field(init=False)

    trained_part = "embeddings of prompt tokens: `decodax train ppd`"

    def __post_init__(self) -> None:
        if not self.trees:
            raise ValueError("prompt tokens need at least one tree")
        if len(self.trees) > 1 and len(self.trees) != self.distances:
            raise ValueError(
                f"there must be one tree for each of the {self.distances} states, or one for all, got {len(self.trees)}"
            )
        for state, tree in enumerate(self.trees, start=1 if len(self.trees) > 1 else self.distances):
            if tree.depth > state:
                raise ValueError(f"a tree for guesses at {state} distances must not be deeper, got depth {tree.depth}")
        set_size(
            self, max(tree.num_nodes(self.ensemble) for tree in self.trees), max(tree.depth for tree in self.trees)
        )

    @property
    def distances(self) -> int:
        """m: prompt tokens behind the root."""
        return max(tree.prompts[0] for tree in self.trees)

    @property
    def num_ranks(self) -> int:
        """Guesses that a tree uses at a distance, at most."""
        return int(max(sibling_ranks(tree.parents).max() for tree in self.trees)) + 1

    @cached_property
    def _tables(self) -> _Tables:
        parts = [_layout(tree, self.ensemble, self.distances, self.num_nodes) for tree in self.trees]
        return _Tables(*(np.stack(arrays) for arrays in zip(*parts, strict=True)))

    @cached_property
    def _shapes(self) -> tuple[Tree, ...]:
        return tuple(Tree.fixed(parent.tolist()) for parent in self._tables.parent)

    def check(self, model: Model, draft_params: Any) -> None:
        wanted = (self.distances, self.ensemble, model.config.hidden_size)
        found = draft_params["embedding"].shape
        if len(found) != 3 or found[1:] != wanted[1:] or found[0] < wanted[0]:
            raise ValueError(
                f"prompt tokens for this model and these trees are embeddings of shape {wanted} (distances, ensemble, "
                f"hidden size), got {tuple(found)}: train them for this model, or give trees for fewer distances"
            )

    def start(self, params: Any, draft_params: Any, state: DecodeState) -> Guesses:
        batch = state.tokens.shape[0]
        token = jnp.zeros((batch, self.distances, self.num_ranks), jnp.int32)
        return Guesses(token, jnp.zeros(batch, jnp.int32))

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, Guesses]:
        guesses, tables = state.draft, self._tables
        index = self._tree_index(guesses)
        tree = self._tree(index)
        token = tree_tokens(guesses.token, state.pending(), tree.depth, jnp.asarray(tables.rank)[index])
        token = jnp.where(jnp.asarray(tables.distance)[index] > 0, 0, token)
        is_candidate = jnp.asarray(tables.is_candidate)[index] & (guesses.distances > 0)[:, None]
        distance, member = jnp.asarray(tables.distance)[index], jnp.asarray(tables.member)[index]
        prompt = draft_params["embedding"][jnp.maximum(distance - 1, 0), member]
        embedded = self.model.embed(params, token)
        vectors = jnp.where((distance > 0)[..., None], prompt.astype(embedded.dtype), embedded)
        proposal = fixed_proposal(tree, token, is_candidate)
        return dataclasses.replace(proposal, vectors=vectors), guesses

    def update(self, params: Any, draft_params: Any, state: DecodeState, outcome: Outcome) -> Guesses:
        before, tables = state.draft, self._tables
        index = self._tree_index(before)
        last = jnp.take_along_axis(outcome.path, jnp.maximum(outcome.num_emitted - 1, 0)[:, None], axis=1)[:, 0]
        node = jnp.asarray(tables.prompt_node)[index, last]
        batch, ensemble, distances = node.shape
        logits = jnp.take_along_axis(outcome.logits, node.reshape(batch, -1, 1), axis=1)
        logits = jnp.mean(logits.reshape(batch, ensemble, distances, -1), axis=1)
        token, _ = best_guesses(logits, self.num_ranks)
        took_part = outcome.num_emitted > 0
        return Guesses(
            jnp.where(took_part[:, None, None], token, before.token),
            jnp.where(took_part, jnp.asarray(tables.num_prompts)[index, last], before.distances),
        )

    def _tree_index(self, guesses: Guesses) -> Int[Array, " B"]:
        """Which tree drafts; where there are no guesses yet, the one of the most."""
        states = len(self.trees)
        return jnp.where(guesses.distances > 0, jnp.minimum(guesses.distances, states), states) - 1

    def _tree(self, index: Int[Array, " B"]) -> Tree:
        if len(self.trees) == 1:
            return self._shapes[0]
        depth, ancestors = (
            jnp.asarray(np.concatenate([getattr(tree, name) for tree in self._shapes]))[index]
            for name in ("depth", "ancestors")
        )
        return Tree(jnp.asarray(self._tables.parent)[index], depth, ancestors)


def _layout(tree: PromptTree, ensemble: int, distances: int, num_nodes: int) -> _Tables:
    """One tree's tables: candidates, then for each of them its chains, then filling behind the root."""
    count = len(tree.parents)
    parent = [*tree.parents, *[0] * (num_nodes - count)]
    distance, member = np.zeros(num_nodes, np.int32), np.zeros(num_nodes, np.int32)
    prompt_node = np.zeros((num_nodes, ensemble, distances), np.int32)
    node = count
    for candidate, number in enumerate(tree.prompts):
        for own in range(ensemble):
            for step in range(number):
                parent[node] = candidate if step == 0 else node - 1
                distance[node], member[node], prompt_node[candidate, own, step] = step + 1, own, node
                node += 1
    rank = np.pad(sibling_ranks(tree.parents), (0, num_nodes - count))
    is_candidate = np.arange(num_nodes) < count
    num_prompts = np.pad(np.asarray(tree.prompts, np.int32), (0, num_nodes - count))
    return _Tables(np.asarray(parent, np.int32), rank, is_candidate, distance, member, prompt_node, num_prompts)
