"""Counts of what drafts came to, summed over the rows and rounds of a run."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from decodax.decoding.tree import Tree
from decodax.layers import pytree


@pytree.dataclass
class DraftCounts:
    """A row-round is one forward of the target seen by one row that was not done.

    accepted_lengths[n]: row-rounds in which the row gained n draft tokens and one of the target's, so that new tokens
        = sum of (n + 1) * accepted_lengths[n], exactly. Where a stop token or the row's limit cuts a round short, the
        last token it emitted counts as the target's own.
    offered[d], accepted[d]: row-rounds in which the target's walk stood at depth d and found a draft token to judge
        there, and those in which it went on to depth d + 1. Their ratio is the acceptance at position d + 1.
    num_draft_forwards: runs of the drafter's own network.
    """

    accepted_lengths: Int[Array, " A"]
    offered: Int[Array, " C"]
    accepted: Int[Array, " C"]
    num_draft_forwards: Int[Array, ""]

    @classmethod
    def zero(cls, max_depth: int) -> "DraftCounts":
        nothing = jnp.zeros(max_depth, jnp.int32)
        return cls(jnp.zeros(max_depth + 1, jnp.int32), nothing, nothing, jnp.int32(0))

    def add(
        self,
        tree: Tree,
        is_candidate: Bool[Array, "B C"],
        path: Int[Array, "B A"],
        num_accepted: Int[Array, " B"],
        num_emitted: Int[Array, " B"],
        num_draft_forwards: Int[Array, ""],
    ) -> "DraftCounts":
        """The counts after a round: the verifier went `num_accepted` deep along `path`, the row took `num_emitted`."""
        took_part = num_emitted > 0
        parent = jnp.broadcast_to(jnp.asarray(tree.parent), is_candidate.shape)
        is_child = parent[:, None, :] == jnp.arange(tree.num_nodes, dtype=jnp.int32)[None, :, None]
        has_child = jnp.any(is_child & is_candidate[:, None, :], axis=2)
        depth = jnp.arange(self.offered.shape[0], dtype=jnp.int32)[None, :]
        went_on = (num_accepted[:, None] > depth) & took_part[:, None]
        stood = (num_accepted[:, None] >= depth) & took_part[:, None]
        offered = stood & jnp.take_along_axis(has_child, path[:, :-1], axis=1)
        lengths = self.accepted_lengths.at[jnp.where(took_part, num_emitted - 1, self.accepted_lengths.shape[0])]
        return dataclasses.replace(
            self,
            accepted_lengths=lengths.add(1, mode="drop"),
            offered=self.offered + jnp.sum(offered, axis=0, dtype=jnp.int32),
            accepted=self.accepted + jnp.sum(went_on, axis=0, dtype=jnp.int32),
            num_draft_forwards=self.num_draft_forwards + num_draft_forwards,
        )
