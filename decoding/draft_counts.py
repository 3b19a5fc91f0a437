"""Counts proposed, accepted and emitted tokens of speculative decoding, summed over rows and rounds."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from decodax.core import pytree
from decodax.decoding.tree import Tree


@pytree.dataclass
class DraftCounts:
    """Counts of row-rounds: one is a forward of the target in one row that is not done.

    accepted_lengths[n]: row-rounds that emitted n draft tokens and one of the target's, so that new tokens are exactly
        the sum of (n + 1) * accepted_lengths[n]. Where a stop token or the row's limit cuts a round short, the last
        token it emitted counts as the target's own.
    proposed[d]: row-rounds in which verification reached depth d and a draft token was proposed for depth d + 1.
    accepted[d]: those in which one was accepted. accepted / proposed is the acceptance rate at position d + 1.
    num_draft_forwards: runs of the drafter's own network.
    """

    accepted_lengths: Int[Array, " A"]
    proposed: Int[Array, " C"]
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
        """The counts after a round.

        tree, is_candidate: the proposal.
        path, num_accepted: the root and the accepted nodes.
        num_emitted: tokens added to the row; 0 where it was done.
        num_draft_forwards: runs of the drafter's own network in the round.
        """
        is_active = num_emitted > 0
        parent = jnp.broadcast_to(jnp.asarray(tree.parent), is_candidate.shape)
        is_child = parent[:, None, :] == jnp.arange(tree.num_nodes, dtype=jnp.int32)[None, :, None]
        has_child = jnp.any(is_child & is_candidate[:, None, :], axis=2)
        depth = jnp.arange(self.proposed.shape[0], dtype=jnp.int32)[None, :]
        accepted = (num_accepted[:, None] > depth) & is_active[:, None]
        reached = (num_accepted[:, None] >= depth) & is_active[:, None]
        proposed = reached & jnp.take_along_axis(has_child, path[:, :-1], axis=1)
        lengths = self.accepted_lengths.at[jnp.where(is_active, num_emitted - 1, self.accepted_lengths.shape[0])]
        return dataclasses.replace(
            self,
            accepted_lengths=lengths.add(1, mode="drop"),
            proposed=self.proposed + jnp.sum(proposed, axis=0, dtype=jnp.int32),
            accepted=self.accepted + jnp.sum(accepted, axis=0, dtype=jnp.int32),
            num_draft_forwards=self.num_draft_forwards + num_draft_forwards,
        )
