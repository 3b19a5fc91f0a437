"""Drafts nothing: the tree of one node, which is plain decoding.

With it everything that can be changed about the target's forward (its depth) decodes alone, in the same loop.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from decodax.decoding.drafters._contract import Drafter, Proposal, fixed_proposal
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree


@dataclass(frozen=True)
class NoDraft(Drafter):
    """Nothing but the pending token."""

    num_nodes: int = 1
    max_depth: int = 0

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, Any]:
        token = state.pending()[:, None]
        return fixed_proposal(Tree.chain(1), token, jnp.zeros(token.shape, bool)), state.draft
