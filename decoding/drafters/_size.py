"""Sets a drafter's number of nodes and maximum depth from its other fields, in its `__post_init__`."""

from collections.abc import Sequence

import numpy as np

from decodax.core.arguments import is_integer, refusal, shown
from decodax.decoding.drafters.contract import Drafter
from decodax.decoding.tree import MAX_DRAFT_TOKENS, Tree


def set_size(drafter: Drafter, num_nodes: int, max_depth: int) -> None:
    """Sets both fields; a plain assignment would raise, as the drafter is a frozen dataclass."""
    object.__setattr__(drafter, "num_nodes", num_nodes)
    object.__setattr__(drafter, "max_depth", max_depth)


def check_chain(num_tokens: int) -> None:
    """Raises ValueError for a chain of no tokens, or of more than a draft may have."""
    if not is_integer(num_tokens):
        raise refusal("the number of tokens of a draft", "an integer", num_tokens)
    if not 1 <= num_tokens <= MAX_DRAFT_TOKENS:
        bound = "at least 1 token" if num_tokens < 1 else f"at most {MAX_DRAFT_TOKENS} tokens"
        raise ValueError(f"a draft must hold {bound}, got {shown(num_tokens)}")


def set_chain(drafter: Drafter, num_tokens: int) -> None:
    """The root and `num_tokens` tokens after it. Raises ValueError for none."""
    check_chain(num_tokens)
    set_size(drafter, num_tokens + 1, num_tokens)


def set_tree(drafter: Drafter, parents: Sequence[int]) -> None:
    """A fixed tree (`parents` as in `Tree.fixed`). Raises ValueError where it has no node but the root."""
    tree = Tree.fixed(parents)
    if tree.num_nodes < 2:
        raise ValueError("a draft must hold at least 1 token, got 0: for none, use the strategy 'autoregressive'")
    set_size(drafter, tree.num_nodes, int(np.max(tree.depth)))
