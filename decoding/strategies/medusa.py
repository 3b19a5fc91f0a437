"""Drafts a tree from Medusa heads and verifies it by exact match (Medusa-1 and Medusa-2)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decodax.core.arguments import refusal, share
from decodax.decoding.auxiliary_weights import find_auxiliary_weights
from decodax.decoding.draft_length import DraftChoice, choose_tree_size, latency_curve
from decodax.decoding.drafters.medusa_heads import MedusaHeads
from decodax.decoding.strategies.contract import DraftingStrategy, Speculation
from decodax.decoding.tree_choice import best_tree, expected_tokens
from decodax.decoding.verifiers.exact_match import ExactMatch
from decodax.decoding.verifiers.typical_acceptance import TypicalAcceptance
from decodax.layers.adapters.low_rank import merged

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

SIZES = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # tokens per forward among which "auto" chooses


@dataclass(frozen=True)
class MedusaTree(DraftingStrategy):
    """A fixed tree of `draft_tokens` nodes after the root, chosen by the measured accuracy of each head's tokens.

    Medusa, arXiv 2401.10774. With "auto" the size is the one with the most tokens per second by measured forwards.
    Heads that were trained together with the model (Medusa-2) come with a LoRA adapter: the text is then, token for
    token, that of the adapted model.

    epsilon: accept what is typical, by this threshold of the paper (its delta is the square root); not lossless. None:
        accept by exact match.
    """

    draft_tokens: int | str = 16
    epsilon: float | None = None

    can_measure = True
    auxiliary_weights = MedusaHeads.auxiliary_weights

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon is not None and share("epsilon", self.epsilon) == 0:
            raise refusal("epsilon", "a number above 0, at most 1", self.epsilon)

    def build(self, lm: "LanguageModel", draft: Any = None, batch_size: int = 1) -> Speculation | DraftChoice:
        auxiliary = find_auxiliary_weights("medusa", lm, draft)
        accuracy = within_depth(auxiliary.rank_accuracy)
        draft_tokens = self.draft_tokens
        if isinstance(draft_tokens, str):
            seconds = latency_curve(lm.model, lm.params, (1, *SIZES), batch_size=batch_size)
            tokens = {size: expected_tokens(accuracy, best_tree(accuracy, size - 1)) for size in SIZES}
            choice = choose_tree_size(seconds, tokens)
            if not choice.num_tokens:
                return choice
            draft_tokens = choice.num_tokens
        tree = best_tree(accuracy, draft_tokens)
        adapter, params = auxiliary.params.get("low_rank"), None
        if adapter is not None:
            scale = auxiliary.shape["change_scale"]
            params = lm.model.stacked(merged(lm.model.unstacked(lm.params), adapter, scale))
        epsilon = self.epsilon
        verifier = ExactMatch() if epsilon is None else TypicalAcceptance(epsilon, math.sqrt(epsilon))
        return Speculation(MedusaHeads(lm.model, tree), verifier, auxiliary.params["heads"], params=params)


def within_depth(accuracy: Sequence[Sequence[float]]) -> list[list[float]]:
    """The accuracies, at least 1e-9, and 0 after the last head, so that no tree is deeper than there are heads."""
    return [*([max(share, 1e-9) for share in ranks] for ranks in accuracy), [0.0] * len(accuracy[-1])]
