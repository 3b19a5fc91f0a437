"""Drafts nothing: the tree has one node, which is plain decoding.

It runs a layer policy without draft tokens, in the same loop.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from decodax.decoding.drafters.contract import Drafter, Proposal, fixed_proposal
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree


@dataclass(frozen=True)
class NoDraft(Drafter):
    """Proposes the last token alone."""

    num_nodes: int = 1
    max_depth: int = 0

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, Any]:
        token = state.last_token()[:, None]
        return fixed_proposal(Tree.chain(1), token, jnp.zeros(token.shape, bool)), state.draft
