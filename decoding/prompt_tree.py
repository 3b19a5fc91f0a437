"""Builds trees for parallel prompt decoding: candidate tokens, each followed by a chain of prompt tokens.

The prompt tokens after the last accepted candidate predict the next round's tokens, so a tree decides two things: the
accepted length of this round, and for how many distances the next one has predictions (its state, 1 .. m).
Hardware-Aware Parallel Prompt Decoding, arXiv 2405.18628.

Static: every candidate has m prompt tokens. Dynamic: one tree for each state, with prompt tokens removed where they are
worth least. Departs from the authors' code in the Markov chain of states: a round that accepts nothing ends at the
root, whose m prompt tokens lead to state m; their model has one more, empty round there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from decodax.decoding.tree import Tree
from decodax.decoding.tree_choice import acceptance_probabilities, best_tree


@dataclass(frozen=True)
class PromptTree:
    """A tree of candidates with prompt tokens.

    parents: of the candidates, as in `Tree.fixed`, the root included.
    prompts[i]: number of prompt tokens after candidate i, at least 1, as a round without predictions drafts nothing;
        the root's is the largest.
    """

    parents: tuple[int, ...]
    prompts: tuple[int, ...]

    def __post_init__(self) -> None:
        Tree.fixed(self.parents)
        if len(self.prompts) != len(self.parents):
            raise ValueError(
                f"every candidate needs its number of prompt tokens: got {len(self.prompts)} for {len(self.parents)}"
            )
        if min(self.prompts) < 1 or self.prompts[0] < max(self.prompts):
            raise ValueError(
                f"each candidate needs at least 1 prompt token and the root the most, got {self.prompts}: "
                "give the tree room for more nodes"
            )

    @property
    def depth(self) -> int:
        """The number of distances whose predictions it uses."""
        return int(np.max(Tree.fixed(self.parents).depth))

    def num_nodes(self, ensemble: int = 1) -> int:
        """Tokens of a forward: candidates, and `ensemble` chains of prompt tokens after each."""
        return len(self.parents) + ensemble * sum(self.prompts)


def node_probabilities(
    accuracy: Sequence[Sequence[float]], parents: Sequence[int]
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """For each candidate the probability that it is accepted, and that the accepted path ends there.

    accuracy[d][r]: probability that the r-th token for distance d + 1 is right, given that those before it were.

    >>> accepted, ends = node_probabilities([[0.5, 0.2], [0.4]], (-1, 0, 0, 1))
    >>> accepted.tolist(), [round(float(value), 2) for value in ends]
    ([1.0, 0.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2])
    """
    accepted = acceptance_probabilities([*accuracy, ()], parents)
    ends = accepted.copy()
    np.subtract.at(ends, np.asarray(parents[1:], int), accepted[1:])
    return accepted, ends


def static_tree(accuracy: Sequence[Sequence[float]], num_candidates: int) -> PromptTree:
    """The best tree of `num_candidates` candidates, each with prompt tokens for all distances."""
    parents = _candidates(accuracy, len(accuracy), num_candidates)
    return PromptTree(parents, (len(accuracy),) * len(parents))


def stationary_distribution(
    accuracy: Sequence[Sequence[float]], trees: Sequence[PromptTree]
) -> Float[np.ndarray, " m"]:
    """The stationary probability of each state; state k (from 1) drafts with `trees[k - 1]`."""
    moves = np.zeros((len(trees), len(trees)))
    for state, tree in enumerate(trees):
        _, ends = node_probabilities(accuracy, tree.parents)
        np.add.at(moves[state], np.asarray(tree.prompts) - 1, ends)
    system = np.vstack([moves.T - np.eye(len(trees)), np.ones(len(trees))])
    return np.linalg.lstsq(system, np.append(np.zeros(len(trees)), 1.0), rcond=None)[0]


def stationary_expected_tokens(accuracy: Sequence[Sequence[float]], trees: Sequence[PromptTree]) -> float:
    """Mean tokens per target forward in the long run, the target's own included. A single tree serves every state."""
    gains = [float(node_probabilities(accuracy, tree.parents)[0].sum()) for tree in trees]
    return gains[0] if len(trees) == 1 else float(stationary_distribution(accuracy, trees) @ np.asarray(gains))


def dynamic_trees(accuracy: Sequence[Sequence[float]], num_nodes: int, ensemble: int = 1) -> tuple[PromptTree, ...]:
    """One tree for each state, none with more than `num_nodes` tokens, that together give the most tokens per forward.

    Each state has the best candidates for its distances; prompt tokens are removed where they are worth least. The
    number of candidates of each state is found by trying.

    Raises ValueError where there is no room for one candidate with its prompt tokens.
    """
    distances = len(accuracy)
    root = 1 + ensemble * distances
    most = (num_nodes - root) // (1 + ensemble)  # candidates, each with one prompt token
    if most < 1:
        raise ValueError(
            f"a tree of {distances} distances needs at least {root + 1 + ensemble} nodes, got {num_nodes}: raise "
            "draft_tokens"
        )
    sizes = sorted({max(1, round(most * share)) for share in (0.3, 0.4, 0.5, 0.65, 0.8, 1.0)})
    # The value of a prompt token depends on all states, so start with equal sizes and improve one at a time.
    chosen = [sizes[len(sizes) // 2]] * distances
    best = _score(accuracy, chosen, num_nodes, ensemble)
    for _ in range(2):
        for state in range(distances):
            for size in sizes:
                trial = [*chosen[:state], size, *chosen[state + 1 :]]
                found = _score(accuracy, trial, num_nodes, ensemble)
                if found[0] > best[0] + 1e-12:
                    chosen, best = trial, found
    return best[1]


def _score(accuracy, sizes: Sequence[int], num_nodes: int, ensemble: int) -> tuple[float, tuple[PromptTree, ...]]:
    candidates = [_candidates(accuracy, state, size) for state, size in enumerate(sizes, start=1)]
    gains = [float(node_probabilities(accuracy, parents)[0].sum()) for parents in candidates]
    trees = tuple(
        _with_prompts(accuracy, parents, gains, (num_nodes - len(parents)) // ensemble) for parents in candidates
    )
    return stationary_expected_tokens(accuracy, trees), trees


def _with_prompts(accuracy, parents: tuple[int, ...], gains: Sequence[float], room: int) -> PromptTree:
    """Prompt tokens for all distances after every candidate, removed until no more than `room` are left.

    Removing one of k from a candidate costs the probability that the path ends there, times the tokens that state k
    gives more than state k - 1.

    gains: expected tokens of a round in each state.
    """
    _, ends = node_probabilities(accuracy, parents)
    prompts = np.full(len(parents), len(accuracy))
    while prompts.sum() > room:
        worth = np.array([gains[k - 1] - gains[k - 2] if k > 1 else 0.0 for k in prompts])
        loss = np.where(prompts > 1, ends * worth, np.inf)
        loss[0] = np.inf  # after a round that accepts nothing, the next one has predictions for all distances
        prompts[np.argmin(loss)] -= 1
    return PromptTree(parents, tuple(map(int, prompts)))


def _candidates(accuracy: Sequence[Sequence[float]], distances: int, count: int) -> tuple[int, ...]:
    """The best `count` candidates no deeper than `distances`, or all that there are."""
    ranks = len(accuracy[0])
    # Only nodes that are too deep have value 0: a token that was never right still comes before them.
    table = [*([max(share, 1e-9) for share in shares] for shares in accuracy[:distances]), [0.0] * ranks]
    return best_tree(table, min(count, sum(ranks**depth for depth in range(1, distances + 1))))
