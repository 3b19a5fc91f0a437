"""Fills in a drafter's number of nodes and depth, which follow from what it was made with: for its `__post_init__`."""

from collections.abc import Sequence

import numpy as np

from decodax.arguments import is_integer, refusal, shown
from decodax.decoding.drafters._contract import Drafter
from decodax.decoding.tree import Tree

# Who attends to whom among the nodes of a draft is a square of their number, and every node has logits for the whole
# vocabulary: more than this compiles for minutes, and fills memory. Published methods draft up to about a hundred.
MAX_DRAFT_TOKENS = 1024
_TOKENS = "the tokens of a draft"


def check_draft_tokens(name: str, num_tokens: int, context: int | None = None) -> None:
    """Raises ValueError where a draft is larger than any may be, or than the model's `context` could ever hold."""
    most = MAX_DRAFT_TOKENS if context is None else min(MAX_DRAFT_TOKENS, context - 1)
    if num_tokens > most:
        why = "" if most == MAX_DRAFT_TOKENS else f", as the model's context is {context}"
        raise ValueError(f"{name} must be at most {most}{why}, got {shown(num_tokens)}")


def set_size(drafter: Drafter, num_nodes: int, max_depth: int) -> None:
    """The drafter is a frozen dataclass, so that plain assignment would raise."""
    object.__setattr__(drafter, "num_nodes", num_nodes)
    object.__setattr__(drafter, "max_depth", max_depth)


def check_chain(num_tokens: int) -> None:
    """Raises ValueError for a chain of no tokens, or of more than a draft may have."""
    if not is_integer(num_tokens):
        raise refusal(_TOKENS, "an integer", num_tokens)
    if num_tokens < 1:
        raise ValueError(f"a draft must hold at least 1 token, got {num_tokens}")
    check_draft_tokens(_TOKENS, num_tokens)


def set_chain(drafter: Drafter, num_tokens: int) -> None:
    """The root and `num_tokens` tokens behind it; raises ValueError for none."""
    check_chain(num_tokens)
    set_size(drafter, num_tokens + 1, num_tokens)


def set_tree(drafter: Drafter, parents: Sequence[int]) -> None:
    """A fixed tree (`parents` as in `Tree.fixed`); raises ValueError where it has no node but the root."""
    check_draft_tokens(_TOKENS, len(parents) - 1)
    tree = Tree.fixed(parents)
    if tree.num_nodes < 2:
        raise ValueError("a draft must hold at least 1 token, got 0: for none, use the strategy 'autoregressive'")
    set_size(drafter, tree.num_nodes, int(np.max(tree.depth)))
