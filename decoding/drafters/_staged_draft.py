"""Drafts level by level with a network that has a cache: a level's nodes attend to the draft's earlier nodes.

Those are staged beside the cache, which holds nothing that the target may reject. A step runs one level's nodes in one
forward (a chain has one node per level), stages their cache updates, and adds their children.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from decodax.core import pytree
from decodax.decoding.state import DecodeState
from decodax.layers.attention.mask import Ancestors
from decodax.layers.kv_cache.staged import Staged, place, stage


@pytree.dataclass
class StagedDraft:
    """A draft in progress, of U nodes. The target verifies the first C of them.

    level: the next to run.
    active: rows that need it run.
    token: of the nodes so far.
    is_candidate: which of them may be accepted.
    logprobs: from which the children of each node were drawn; None where none are drawn.
    updates: cache updates of the nodes run, an entry per cache.
    own: what a drafter carries besides.
    """

    level: Int[Array, ""]
    active: Bool[Array, " B"]
    token: Int[Array, "B U"]
    is_candidate: Bool[Array, "B U"]
    logprobs: Float32[Array, "B C V"] | None
    updates: tuple[Any, ...]
    own: Any

    @classmethod
    def begin(
        cls,
        state: DecodeState,
        num_nodes: int,
        updates: tuple[Any, ...],
        *,
        logprobs: Float32[Array, "B C V"] | None = None,
        own: Any = (),
    ) -> Self:
        """A draft of the last token alone; `updates` are empty ones for all its nodes."""
        shape = (state.tokens.shape[0], num_nodes)
        token = jnp.zeros(shape, jnp.int32).at[:, 0].set(state.last_token())
        return cls(jnp.int32(0), ~state.done, token, jnp.zeros(shape, bool), logprobs, updates, own)

    def with_children(
        self, node: Int[Array, "..."], token: Int[Array, "B ..."], is_candidate: Bool[Array, "B ..."]
    ) -> Self:
        """The draft with tokens at these nodes; a node beyond the draft is dropped."""
        return replace(
            self,
            token=self.token.at[:, node].set(token, mode="drop"),
            is_candidate=self.is_candidate.at[:, node].set(is_candidate, mode="drop"),
        )


class Level(NamedTuple):
    """Nodes to run at once, and what a forward takes for them.

    node: their indices; one beyond the draft is padding.
    token, position: of each.
    mask: which staged nodes each attends to, and itself.
    staged_position: of all nodes of the draft.
    """

    node: Int[Array, " W"]
    token: Int[Array, "B W"]
    position: Int[Array, "B W"]
    mask: Ancestors
    staged_position: Int[Array, "B U"]

    def stage(self, caches: tuple[Any, ...], updates: tuple[Any, ...]) -> tuple[Staged, ...]:
        """The caches with the draft's nodes beside them, one update for each."""
        return stage(caches, updates, self.staged_position)


@dataclass(frozen=True)
class Layout:
    """Where the nodes of a draft are.

    position: of each node.
    above: the nodes to which each attends, without itself.
    levels: the nodes to run in each step; an index beyond the draft is padding.
    """

    position: Int[Array, "B U"]
    above: Bool[Array | np.ndarray, "#B U U"]
    levels: Int[np.ndarray, "I W"]

    @classmethod
    def chain(cls, length: Int[Array, " B"], num_nodes: int, first: int = 0) -> Self:
        """A chain after the last token of rows of this length, one node per level; nodes before `first` never run."""
        offset = np.arange(num_nodes, dtype=np.int32)
        above = (offset[None, None, :] < offset[None, :, None]) & (offset >= first)
        return cls(length[:, None] - 1 + offset[None, :], above, offset[:, None])

    def level(self, draft: StagedDraft) -> Level:
        """The draft's next level."""
        node = jnp.asarray(self.levels)[draft.level]
        inside = jnp.minimum(node, self.position.shape[1] - 1)
        above, width = jnp.asarray(self.above)[:, inside], node.shape[0]
        themselves = jnp.broadcast_to(jnp.eye(width, dtype=bool), (above.shape[0], width, width))
        mask = Ancestors(jnp.concatenate([above, themselves], axis=2))
        return Level(node, draft.token[:, inside], self.position[:, inside], mask, self.position)


def draft_levels(
    draft: StagedDraft,
    layout: Layout,
    run: Callable[[StagedDraft, Level], tuple[Any, tuple[Any, ...]]],
    expand: Callable[[StagedDraft, Level, Any], StagedDraft],
    num_levels: Int[Array, ""] | int,
) -> StagedDraft:
    """Runs level after level, up to `num_levels` or until no row is active.

    run: gives the outputs at a level's nodes, in any form, and their cache updates.
    expand: adds the children of a level's nodes, from those outputs.
    """

    def step(draft: StagedDraft) -> StagedDraft:
        level = layout.level(draft)
        output, updates = run(draft, level)
        draft = replace(draft, updates=place(draft.updates, updates, level.node))
        return replace(expand(draft, level, output), level=draft.level + 1)

    return jax.lax.while_loop(lambda draft: (draft.level < num_levels) & jnp.any(draft.active), step, draft)
